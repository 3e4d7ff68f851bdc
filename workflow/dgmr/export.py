"""A model artefact as an ONNX file, checked against the artefact's own model before it appears."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.data import resolve_model_data_config

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import ORIGIN, replaced_files
from dgmr.models import TimmModel, input_size

OPSET = 20
"""Version of the ONNX operators that the file uses."""
TOLERANCE = 1e-4
"""Largest allowed difference to the model's output, as a fraction of its largest absolute value."""
INPUT, LOGITS, POOLED = "images", "logits", "pooled"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_TRACED_BATCH, _CHECKED_BATCHES = 2, (1, 3)


def export(folder: Path, output: Path) -> None:
    """Write the artefact ``folder`` as the ONNX file ``output``.

    Its input ``images`` is ``[B, C, H, W]``, normalised, of the size that the model was built for
    and any B; its output is ``logits`` ``[B, classes]``, or ``pooled`` ``[B, D]`` where the model
    has no classifier. The metadata key ``origin`` has, as JSON, the hash of the artefact's weights
    and the transform that the images need. Where the weights take more than 1.5 GB they are in a
    second file, ``<output>.data``.

    Raises:
        DgmrError: the folder is no artefact, a package is missing, torch cannot export the model,
            or ONNX Runtime computes something else than it; ``output`` is then left as it was.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise DgmrError(f"export needs {' and '.join(missing)}: pip install 'dgmr[export]'.")
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it tells of passes that did nothing
    about = artefact.provenance(folder)
    model = artefact.load(folder)
    try:
        program = torch.onnx.export(
            model,
            (_images(model, _TRACED_BATCH),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[LOGITS if model.num_classes else POOLED],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            optimize=False,  # it renames weights; ONNX Runtime optimises when it loads the file
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DgmrError(f"export: torch cannot turn {folder} into ONNX: {reason}") from error
    assert program is not None
    origin = {"sha256": about["sha256"], "transform": resolve_model_data_config(model)}
    program.model.metadata_props[ORIGIN] = json.dumps(origin)

    # A graph whose weights are in a second file names that file.
    with replaced_files(output.parent, output.name) as folder:
        program.save(folder / output.name)
        check(folder / output.name, model)


@torch.inference_mode()
def check(file: Path, model: TimmModel) -> None:
    """Compare an ONNX file with ``model`` on random normalised images, in two batch sizes.

    Raises:
        DgmrError: ONNX Runtime cannot run it, or its output differs by more than ``TOLERANCE``.
    """
    import onnxruntime

    for count in _CHECKED_BATCHES:
        images = _images(model, count)
        expected = model(images)
        try:
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
        except Exception as error:  # its errors have no class in common
            raise DgmrError(f"export: ONNX Runtime cannot run the model: {error}") from error
        if found.shape != expected.shape:
            raise DgmrError(
                f"export: of {count} images ONNX Runtime makes {list(found.shape)}, the model"
                f" {list(expected.shape)}."
            )
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:  # NaN fails, too
            raise DgmrError(
                f"export: of {count} images ONNX Runtime's output differs from the model's by"
                f" {difference:.2g} of its largest value; allowed are {TOLERANCE:g}."
            )


def _images(model: TimmModel, count: int) -> torch.Tensor:
    return torch.randn(count, *input_size(model), generator=torch.Generator().manual_seed(count))
