"""The student in the store is the student on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import told
import torch
from dgmr import artefact
from dgmr.models import outputs_and_logits
from dgmr.prune import prune_model
from dgmr.track import student
from dgmr.track.tell import sync, track

# Apart from this package, and where nothing may be unpickled.
LOAD = """
import os, sys
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
images = np.load(sys.argv[2])
for uri, output in zip(sys.argv[3::2], sys.argv[4::2]):
    np.save(output, mlflow.pyfunc.load_model(uri).predict(images))
assert "dgmr" not in sys.modules
"""
UNEVEN = {"blocks.0.mlp": 32, "blocks.1.mlp": 64}


def replace(folder, model):
    shutil.rmtree(folder)
    artefact.save(folder, model, {"stage": "distill all"})


def expected(folder, images):
    with torch.inference_mode():
        outputs, logits = outputs_and_logits(artefact.load(folder), images)
    return (outputs.pooled if logits is None else logits).numpy()


def test_loaded_model_answers_as_the_artefact_does(results, experiment, tmp_path):
    students = {
        "classifier": (prune_model(tiny.vit(), 0.5), tiny.CLASSES),
        "features": (prune_model(tiny.siglip(), 0.5), 32),
        "uneven": (prune_model(tiny.vit(), hidden_features=UNEVEN), tiny.CLASSES),
    }
    images = tiny.pixels(3)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", LOAD, told.STORE, tmp_path / "images.npy"]
    answers = {}
    for name, (model, _) in students.items():
        replace(results / "student", model)
        assert track("report", told.make_params(name), results)
        (logged,) = told.Store(name).models()
        answers[name] = expected(results / "student", images)
        command += [logged.model_uri, tmp_path / f"{name}.npy"]
    environment = {k: v for k, v in told.ENVIRONMENT.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, width) in students.items():
        found = np.load(tmp_path / f"{name}.npy")
        assert found.shape == (3, width) and found.dtype == np.float32
        np.testing.assert_allclose(found, answers[name], rtol=1e-5, atol=1e-6)


def test_signature_example_and_files(results, experiment, store):
    import mlflow

    track("report", told.make_params(experiment), results)
    (model,) = store().models()
    folder = mlflow.artifacts.download_artifacts(model.model_uri, tracking_uri=told.STORE)
    info = mlflow.models.get_model_info(folder)
    assert info.signature.inputs.inputs[0].shape == (-1, 3, tiny.SIDE, tiny.SIDE)
    assert info.signature.outputs.inputs[0].shape == (-1, tiny.CLASSES)
    loaded = mlflow.pyfunc.load_model(folder)
    assert loaded.predict(loaded.input_example).shape == (1, tiny.CLASSES)
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pth")]
    requirements = (Path(folder) / "requirements.txt").read_text()
    assert "timm==" in requirements and "torch==" in requirements and "+" not in requirements
    (run,) = [run for run in store().all() if run.data.tags.get("dgmr.room") == "report"]
    assert model.source_run_id == run.info.run_id
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert not student.SCRATCH.exists()


def test_student_is_logged_once_and_anew_when_it_differs(results, experiment, store):
    config = told.make_params(experiment)
    for _ in range(2):
        sync(config, results)
    (before,) = store().models()
    replace(results / "student", prune_model(tiny.vit(seed=1), 0.5))
    told.stamp(results, "report", config)
    sync(config, results)
    (after,) = store().models()
    assert before.model_id != after.model_id
    sha256 = json.loads((results / "student/provenance.json").read_text())["sha256"]
    assert after.tags["dgmr.sha256"] == sha256 != before.tags["dgmr.sha256"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["log_model_artifacts", "log_outputs", "finalize_logged_model"])
def test_half_logged_student_is_replaced(results, experiment, store, monkeypatch, method):
    from mlflow import MlflowClient

    def killed(*_):
        raise Killed

    config = told.make_params(experiment)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MlflowClient, method, killed)
        track("report", config, results)
    assert [str(model.status) for model in store().models()] == ["PENDING"]
    assert track("report", config, results)
    (model,) = store().models()
    assert str(model.status) == "READY"
    store().finished()


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_student_can_be_registered(results, experiment, request, where):
    import mlflow

    uri = told.STORE if where == "sqlite" else request.getfixturevalue("server").uri
    track("report", told.make_params(experiment, uri), results)
    (model,) = told.Store(experiment, uri).models()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        version = mlflow.register_model(model.model_uri, f"student-{where}")
        assert version.version in (1, "1")
        loaded = mlflow.pyfunc.load_model(f"models:/student-{where}/1")
    finally:
        mlflow.set_tracking_uri(before)
    images = tiny.pixels(2)
    found = loaded.predict(images.numpy())
    np.testing.assert_allclose(found, expected(results / "student", images), rtol=1e-5, atol=1e-6)
