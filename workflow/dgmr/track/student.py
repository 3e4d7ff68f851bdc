"""The student as an MLflow model: logged once a run, loaded by ``mlflow.pyfunc``, ready to register."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmr.files import read_json
from dgmr.fingerprint import versions
from dgmr.track.store import POINT

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "student"
SCRATCH = Path("work/track-student")
_SHA256 = "dgmr.sha256"


def log(client: "MlflowClient", run: Any, folder: Path, tags: dict[str, str]) -> None:
    """Leave the ``run`` with the artefact ``folder`` as its one model; others of its chain are deleted.

    The chain's are those that have its ``tags``, and are no point's where it is none.

    Callers hold the lock, so whatever is not READY was left by one that was killed.
    """
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    sha256 = read_json(folder / "provenance.json")["sha256"]
    is_there = False
    for model in client.search_logged_models([run.info.experiment_id], wanted):
        if model.tags.get(POINT) != tags.get(POINT):
            continue
        if not is_there and _is_whole(model) and _origin(model) == (run.info.run_id, sha256):
            is_there = True
        else:
            client.delete_logged_model(model.model_id)
    if not is_there:
        _log(client, run, folder, tags | {_SHA256: sha256})


def _is_whole(model: Any) -> bool:
    return str(model.status) == "READY"


def _origin(model: Any) -> tuple[str, str | None]:
    return model.source_run_id, model.tags.get(_SHA256)


def _log(client: "MlflowClient", run: Any, folder: Path, tags: dict[str, str]) -> None:
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    from dgmr.track import served

    run_id = run.info.run_id
    model = client.create_logged_model(
        run.info.experiment_id, NAME, source_run_id=run_id, tags=tags, model_type="timm"
    )
    about = Model(
        artifact_path=model.artifact_location,
        run_id=run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
    )
    signature, example = _signature(read_json(folder / "config.json"))
    # MLflow copies the weights before it sends them: not to /tmp, and what a kill leaves is
    # overwritten, not piled up.
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(SCRATCH.absolute())
    try:
        mlflow.pyfunc.save_model(
            SCRATCH / NAME,
            python_model=served.__file__,
            artifacts={NAME: str(folder.absolute())},
            signature=signature,
            input_example=example,
            pip_requirements=_requirements(),
            mlflow_model=about,
        )
        client.log_model_artifacts(model.model_id, str(SCRATCH / NAME))
    finally:
        tempfile.tempdir = before
        shutil.rmtree(SCRATCH, ignore_errors=True)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")


def _signature(config: dict[str, Any]) -> tuple[Any, Any]:
    """Of timm's ``config.json``: normalised images in, logits or pooled features out; and one image."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = tuple(config["pretrained_cfg"]["input_size"])
    outputs = config["num_classes"] or config["num_features"]
    kind = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, *shape))]),
        outputs=Schema([TensorSpec(kind, (-1, outputs))]),
    )
    return signature, np.zeros((1, *shape), kind)


def _requirements() -> list[str]:
    """What :mod:`dgmr.track.served` needs; of torch's builds, whichever the platform has."""
    found = versions("mlflow", "numpy", "safetensors", "timm", "torch")
    return [f"{name}=={version.partition('+')[0]}" for name, version in found.items()]
