"""The first job: what params.yaml alone cannot tell is checked before any work begins."""

from pathlib import Path
from typing import Any

import timm
import torch

from dgmr import artefact
from dgmr.answers import bytes_per_view
from dgmr.checkpoint import teacher_files
from dgmr.data import tables
from dgmr.data.evaluation import count_classes
from dgmr.distill.learning import learned
from dgmr.errors import DgmrError, told_of
from dgmr.files import write_json
from dgmr.mlps import mlps, widths
from dgmr.models import TimmModel, input_size
from dgmr.params import Params, Teacher
from dgmr.prune.widths import students
from dgmr.targets import check_space


def check(config: Params, targets: Path, output: Path) -> None:
    """Open the teacher's structure and the tables' schemas; write what was found to ``output``.

    ``targets`` is the folder that the targets will be in, where they are cached.

    Raises:
        DgmrError: one sentence on the first thing that would fail later.
    """
    teacher, data = config.teacher, config.data
    model = teacher_skeleton(teacher)
    found_mlps = mlps(model)
    per_view = bytes_per_view(model, config.features)
    _check_students(model, config)
    for name, point in config.points().items():
        with told_of(f"sweep, point {name}"):
            _check_students(model, point)
    if config.features.cache == "disk":
        wanted = data.n_samples * config.features.views.count * per_view
        there = sum(path.stat().st_size for path in targets.rglob("*.safetensors"))
        check_space(wanted - there, targets)
    if input_size(model)[0] != 3:
        raise DgmrError(
            f"teacher.model: {teacher.model} takes {input_size(model)[0]} channels;"
            " images come as RGB, so it must take 3."
        )
    if data.table is not None:
        for path in tables.find(data.table):
            tables.columns(path, data.filters)
    classes = count_classes(data.eval)
    if classes is not None and model.num_classes and classes > model.num_classes:
        raise DgmrError(
            f"data.eval.path: {data.eval.path} has {classes} classes, but teacher.model"
            f" {teacher.model} has {model.num_classes}."
        )
    found: dict[str, Any] = {
        "teacher": {
            "model": teacher.model,
            "hidden_features": widths(model),
            "mlps": len(found_mlps),
        },
    }
    write_json(output, found)


def _check_students(model: TimmModel, config: Params) -> None:
    """Whichever hidden units will be kept, the students can be built, and learn."""
    built = students(model, config.prune, config.distill.stages)
    for name, stage in config.distill.stages.items():
        with told_of(f"distill.stages.{name}.train"):
            learned(built[name], stage, config.features)


def teacher_skeleton(teacher: Teacher) -> TimmModel:
    """The model's structure on the meta device: no weights are read.

    Raises:
        DgmrError: there is no such model, no pretrained weights for it, or a file is missing.
    """
    teacher_files(teacher)
    if artefact.is_uneven(teacher.folder):
        return artefact.skeleton(teacher.folder)
    name = teacher.model
    if ":" not in name:
        if not timm.is_model(name):
            raise DgmrError(
                f"teacher.model: timm knows no model {name}; see timm.list_models(pretrained=True),"
                " or give hf-hub:<repository> or local-dir:<folder>."
            )
        if teacher.checkpoint is None and not timm.is_model_pretrained(name):
            raise DgmrError(f"teacher.model: timm has no pretrained weights for {name}.")
    try:
        with torch.device("meta"):
            model: TimmModel = timm.create_model(name, pretrained=False)
    except Exception as error:
        # timm and the hub raise all sorts of errors; each means the same to the user.
        raise DgmrError(f"teacher.model: {name} cannot be built: {error}") from error
    return model
