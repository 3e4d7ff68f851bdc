"""The model artefact: a folder that plain timm loads, and that says where it came from.

::

    <folder>/
      model.safetensors   all weights
      config.json         timm's own: architecture, model_args, pretrained_cfg
      provenance.json     ours: what made it, from which parent, and the hash of the weights

``timm.create_model("local-dir:<folder>", pretrained=True)`` builds the model. Teacher, pruned and
distilled students are all this one type.
"""

from pathlib import Path
from typing import Any

import torch

from dgmr.errors import DgmrError
from dgmr.files import read_json, replaced_folder, sha256, write_json

WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"


def save(
    folder: Path,
    model: torch.nn.Module,
    provenance: dict[str, Any],
    beside: dict[str, Any] | None = None,
) -> None:
    """Write a timm ``model`` as an artefact; the folder appears whole or not at all.

    ``provenance`` gains ``sha256``, the hash of ``model.safetensors``. ``beside`` are further JSON
    files by name, such as what a stage measured.
    """
    from timm.models import save_for_hf

    with replaced_folder(folder) as partial:
        save_for_hf(model, str(partial), safe_serialization=True)
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
    if sha256(folder / WEIGHTS) != found["sha256"]:
        raise DgmrError(
            f"{folder / WEIGHTS} is not the file that {PROVENANCE} describes: remake it"
            f" (delete {folder} and run snakemake again)."
        )
    return found


def load(folder: Path) -> torch.nn.Module:
    """The artefact's model, on the CPU, in evaluation mode, its weights verified."""
    import timm

    provenance(folder)
    model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def skeleton(folder: Path) -> torch.nn.Module:
    """The artefact's model on the meta device: its structure, without weights or memory."""
    import timm

    with torch.device("meta"):
        model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
    return model.eval()
