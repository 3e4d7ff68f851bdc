"""The whole chain on real images: what it leaves, and that its numbers are those of its files."""

import hashlib
import json
import subprocess
import sys

import pytest

MODELS = ["teacher", "pruned", "mlp", "all"]
FOLDERS = {
    "teacher": "results/teacher",
    "pruned": "results/prune",
    "mlp": "results/distill/mlp",
    "all": "results/distill/all",
}
ROOMS = {"teacher", "data", "features", "prune", "distill/mlp", "distill/all"}
ROOMS |= {"evaluate", "report"}

# Plain timm, PIL and webdataset: all that someone has who was only given the student.
OUTSIDER = """
import sys
sys.modules["dgmr"] = None
import glob, io
import timm, torch, webdataset
from PIL import Image

student, shards = sys.argv[1:]
model = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
transform = timm.data.create_transform(
    **timm.data.resolve_model_data_config(model), is_training=False
)
images, labels = [], []
for sample in webdataset.WebDataset(sorted(glob.glob(shards)), shardshuffle=False):
    images.append(transform(Image.open(io.BytesIO(sample["png"])).convert("RGB")))
    labels.append(int(sample["cls"]))
with torch.inference_mode():
    guesses = torch.cat([model(torch.stack(images[i : i + 50])) for i in range(0, len(images), 50)])
hits = (guesses.argmax(1) == torch.tensor(labels)).sum()
print(len(images), 100 * int(hits) / len(images))
"""


def read(path):
    return json.loads(path.read_text())


def test_metrics_have_the_promised_keys(finished):
    metrics = read(finished / "results/metrics.json")
    for model in ("pruned", "student"):
        for name in ("top1", "feature_mse", "params", "flops", "images_per_s"):
            assert f"{model}.{name}" in metrics
    assert "teacher.top1" in metrics and "teacher.feature_mse" not in metrics
    assert metrics["student.top1"] == metrics["all.top1"]
    assert 0 < metrics["reduction.params"] < 1 and 0 < metrics["reduction.flops"] < 1
    assert metrics["teacher.top1"] > 30  # so that the other tests compare something


def test_torch_has_the_threads_that_snakemake_gives(finished):
    speed = read(finished / "results/evaluate/speed.json")  # a rule that takes all cores
    assert speed["threads"] == 2


def test_report_is_a_page(finished):
    page = (finished / "results/report.html").read_text()
    assert page.startswith("<!") and "resources/teachers/micro" in page


def test_finished_chain_has_nothing_to_do(finished):
    assert not finished.planned()
    before = {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*")}
    assert "Nothing to be done" in finished.finish().output
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*")}


def test_mlflow_has_a_parent_and_a_child_for_each_room(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("micro")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = {run.data.tags["dgmr.room"]: run for run in runs if "dgmr.room" in run.data.tags}
    (parent,) = (run for run in runs if "dgmr.room" not in run.data.tags)
    assert len(runs) == len(children) + 1 and set(children) == ROOMS
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {
        parent.info.run_id
    }
    reported = read(finished / "results/metrics.json")["student.top1"]
    assert parent.data.metrics["student.top1"] == reported


def test_student_is_for_people_who_do_not_have_the_package(finished, tmp_path, clean_environment):
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDER]
        + [str(finished / "results/student"), str(finished / "results/evaluation_data/*.tar")],
        cwd=tmp_path,
        env=clean_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    count, top1 = done.stdout.split()
    assert int(count) == 200
    assert float(top1) == read(finished / "results/metrics.json")["student.top1"]


@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_those_of_the_files(finished, model):
    from safetensors import safe_open

    weights = finished / FOLDERS[model] / "model.safetensors"
    evaluation = read(finished / f"results/evaluate/{model}.json")
    assert evaluation["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    with safe_open(weights, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    count = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        count += size
    assert evaluation["params"] == count
    metrics = read(finished / "results/metrics.json")
    assert metrics[f"{model}.params"] == count
    assert metrics[f"{model}.top1"] == evaluation["top1"]


def test_student_is_a_copy_of_the_last_stage(finished):
    for name in ("model.safetensors", "config.json", "provenance.json"):
        student, last = finished / "results/student" / name, finished / FOLDERS["all"] / name
        assert student.read_bytes() == last.read_bytes()
        assert not student.samefile(last)  # whoever edits the one does not edit the other


def test_reduction_is_that_of_the_last_stage(finished):
    metrics = read(finished / "results/metrics.json")
    for name in ("params", "flops"):
        ratio = metrics[f"all.{name}"] / metrics[f"teacher.{name}"]
        assert metrics[f"reduction.{name}"] == pytest.approx(1 - ratio)
