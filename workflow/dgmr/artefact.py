"""The model artefact: a folder that plain timm loads, and that says where it came from.

::

    <folder>/
      model.safetensors   all weights
      config.json         timm's own: architecture, model_args, pretrained_cfg
      provenance.json     ours: what made it, from which parent, and the hash of the weights
      loader.py           only where the MLPs' widths are not those of any ``mlp_ratio``

``timm.create_model("local-dir:<folder>", pretrained=True)`` builds the model; where there is a
``loader.py``, its ``load`` does. Teacher, pruned and distilled students are all this one type.
"""

import functools
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dgmr import checkpoint
from dgmr.errors import DgmrError
from dgmr.files import read_json, replaced_folder, sha256, write_json

WEIGHTS, CONFIG = checkpoint.WEIGHTS, checkpoint.CONFIG
PROVENANCE, LOADER = "provenance.json", "loader.py"


def save(
    folder: Path,
    model: torch.nn.Module,
    provenance: dict[str, Any],
    beside: dict[str, Any] | None = None,
    weights: tuple[Mapping[str, Tensor], Iterable[tuple[str, Tensor]]] | None = None,
) -> None:
    """Write a timm ``model`` as an artefact; the folder appears whole or not at all.

    Args:
        folder: the artefact.
        model: made by timm; on the meta device where ``weights`` are given.
        provenance: gains ``sha256``, the hash of ``model.safetensors``.
        beside: further JSON files by name, such as what a stage measured.
        weights: layout and tensors as :func:`dgmr.weights.write` takes them; the model's own
            where not given.
    """
    from timm.models._hub import save_config_for_hf

    from dgmr import loader
    from dgmr.models import like
    from dgmr.weights import write

    layout, tensors = weights or (state := model.state_dict(), state.items())
    with torch.device("meta"):
        plain = {key: tensor.shape for key, tensor in like(model).state_dict().items()}
    with replaced_folder(folder) as partial:
        save_config_for_hf(model, str(partial / CONFIG))
        if any(layout[key].shape != shape for key, shape in plain.items()):
            shutil.copyfile(loader.__file__, partial / LOADER)
        write(partial / WEIGHTS, layout, tensors)
        for name, content in (beside or {}).items():
            write_json(partial / name, content)
        write_json(partial / PROVENANCE, provenance | {"sha256": sha256(partial / WEIGHTS)})


def provenance(folder: Path) -> dict[str, Any]:
    """The artefact's ``provenance.json``, after checking the weights against its hash.

    Raises:
        DgmrError: a file is missing, or the weights are not the ones that were written.
    """
    for name in (WEIGHTS, CONFIG, PROVENANCE):
        if not (folder / name).is_file():
            raise DgmrError(f"{folder} is no model artefact: it has no {name}.")
    found: dict[str, Any] = read_json(folder / PROVENANCE)
    status = (folder / WEIGHTS).stat()
    if _sha256(folder / WEIGHTS, status.st_ino, status.st_mtime_ns) != found["sha256"]:
        raise DgmrError(
            f"{folder / WEIGHTS} is not the file that {PROVENANCE} describes: remake it"
            f" (delete {folder} and run snakemake again)."
        )
    return found


@functools.cache
def _sha256(path: Path, _inode: int, _modified_ns: int) -> str:
    """Once per process: a large checkpoint takes seconds."""
    return sha256(path)


def is_uneven(folder: Path | None) -> TypeGuard[Path]:
    """Whether plain timm cannot build the folder's model, for its MLPs differ in width."""
    return folder is not None and (folder / LOADER).is_file()


def load(folder: Path) -> torch.nn.Module:
    """The artefact's model, on the CPU, in evaluation mode, its weights verified."""
    from dgmr import loader

    provenance(folder)
    return loader.load(folder)


def skeleton(folder: Path) -> torch.nn.Module:
    """The artefact's model on the meta device: its structure, without weights or memory."""
    import timm

    from dgmr.loader import fit
    from dgmr.weights import layout

    with torch.device("meta"):
        model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
    fit(model, {name: list(tensor.shape) for name, tensor in layout(folder / WEIGHTS).items()})
    return model.eval()
