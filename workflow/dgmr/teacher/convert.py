"""Bring the teacher in: what timm fetches, or any checkpoint on disk, becomes a model artefact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor

from dgmr import artefact, weights
from dgmr.errors import DgmrError
from dgmr.mlps import mlps
from dgmr.models import TimmModel
from dgmr.params import Teacher

_Filter = Callable[[dict[str, Any], TimmModel], dict[str, Any]]
_NAMED = 3


def convert(teacher: Teacher, output: Path) -> None:
    """Write the teacher as the artefact ``output``.

    Weights on disk keep their dtype and go through memory tensor by tensor; what timm fetches is held
    in memory.

    Raises:
        DgmrError: it cannot be loaded, its weights are not the architecture's, or its MLPs cannot be
            pruned.
    """
    origin = {"stage": "teacher", "source": teacher.model, "checkpoint": teacher.checkpoint}
    if teacher.weights is None:
        model = _made(teacher.model)
        mlps(model)
        artefact.save(output, model, origin)
        return
    if artefact.is_uneven(teacher.folder):
        skeleton, to_native = artefact.skeleton(teacher.folder), None
    else:
        skeleton, to_native = _skeleton(teacher.model)
    mlps(skeleton)
    found = _fitted(teacher, skeleton, to_native)
    artefact.save(output, skeleton, origin, weights=(found, found.items()))


def _made(name: str) -> TimmModel:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:
        # timm and the hub raise all sorts of errors; each means the same to the user.
        raise DgmrError(f"teacher.model: {name} cannot be loaded: {error}") from error


def _skeleton(name: str) -> tuple[TimmModel, _Filter | None]:
    """The model on the meta device, and timm's converter of checkpoints from elsewhere.

    Which converter a model has, with which options, timm says to its loader alone, so this listens
    in its place.
    """
    with torch.device("meta"), mock.patch("timm.models._builder.load_pretrained") as load:
        model = _made(name)
    return model, load.call_args.kwargs["filter_fn"]


def _fitted(teacher: Teacher, skeleton: TimmModel, to_native: _Filter | None) -> dict[str, Tensor]:
    """The checkpoint's tensors under the skeleton's names, in its order."""
    assert teacher.weights is not None
    wanted = skeleton.state_dict()
    found = weights.read(teacher.weights)
    if to_native is not None and _misfits(found, wanted):
        try:
            found = to_native(found, skeleton)
        except Exception as error:
            # A converter that meets names it does not expect may fail in any way.
            raise DgmrError(
                f"{teacher.weights} cannot be converted to {teacher.model} by timm ({error!r}):"
                " name the architecture that the weights are of."
            ) from error
    if misfits := _misfits(found, wanted):
        raise DgmrError(
            f"{teacher.weights} does not fit teacher.model {teacher.model}: {'; '.join(misfits)}."
            " Name the architecture that the weights are of, or a local-dir:<folder> whose config.json"
            " has its model_args."
        )
    return {name: found[name] for name in wanted}


def _misfits(found: dict[str, Any], wanted: dict[str, Tensor]) -> list[str]:
    """How the tensors are not those of the model, a clause for each kind of fault."""
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape or kind": [
            f"{name} {_kind(found[name])}, not {_kind(tensor)}"
            for name, tensor in wanted.items()
            if name in found and _kind(found[name]) != _kind(tensor)
        ],
    }
    return [
        f"{len(names)} {fault} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for fault, names in faults.items()
        if names
    ]


def _kind(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'}"
