"""Bring the teacher in: a timm name, a hub reference or a local folder becomes a model artefact."""

from pathlib import Path

import timm

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.models import mlps


def convert(name: str, output: Path) -> None:
    """Write the pretrained timm model ``name`` as the artefact ``output``.

    Raises:
        DgmrError: it cannot be loaded, or its MLPs cannot be pruned.
    """
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        # timm and the hub raise all sorts of errors; each means the same to the user.
        raise DgmrError(f"teacher.model: {name} cannot be loaded: {error}") from error
    mlps(model)
    artefact.save(output, model, {"stage": "teacher", "source": name})
