"""Every step that writes files, small: ``STEPS[name](rooms, folder, variant)`` does it in ``folder``.

The results of variant 0 and 1 differ in every file that they have in common, as far as that is possible.
"""

import contextlib
import shutil
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from dgmr import artefact, fashion_mnist
from dgmr.data import evaluation, fashion_table, pack, publish, select
from dgmr.distill import trainer
from dgmr.evaluate import accuracy, gather
from dgmr.export import export
from dgmr.features import calibration, targets
from dgmr.features import publish as features_publish
from dgmr.files import write_json
from dgmr.params import Data, EvaluationData, Ordering, Prune, Running, Stage, StagePrune, Teacher
from dgmr.prune import again, assemble, orders, prune_model, refits, saliency
from dgmr.report import page
from pictures import encoded, picture
from report.test_report import PARAMS, STAGES, write_chain

SHARDS = ["00000", "00002"]


class Rooms:
    """What the steps read, twice."""

    def __init__(self, folder):
        self.folder = folder
        for variant in (0, 1):
            self._make(folder / str(variant), variant)
        write_chain(folder / "results")

    def __getattr__(self, name):
        return lambda variant: self.folder / str(variant) / name

    def _make(self, folder, variant):
        model = tiny.vit(seed=variant)
        tiny.write_teacher(folder / "teacher", model)
        labels = range(sum(tiny.COUNTS))
        tiny.write_data(folder / "data", labels=labels, first=variant)
        tiny.write_features(folder, folder / "teacher", folder / "data", features_config(variant))
        orders.compute(folder / "teacher", Ordering(), 0, folder / "orders")
        given = folder / "teacher", folder / "orders", folder / "room", Prune(ratio=1.0)
        refits.compute(*given, 0, folder / "refits")
        artefact.save(folder / "parent", prune_model(model, 1.5), {"stage": "prune"})
        (folder / "pictures").mkdir()
        names = [f"{index}.png" for index in range(6)]
        for index, name in enumerate(names):
            (folder / "pictures" / name).write_bytes(encoded(picture(index + variant)))
        pq.write_table(pa.table({"URL": names}), folder / "table.parquet")
        do_select(self, folder / "selected", variant)
        do_pack(self, folder / "packed", variant)
        with small_fashion_mnist(variant):
            do_evaluation(self, folder / "evaluation", variant)


def features_config(variant):
    return tiny.features_config(views={**tiny.VIEWS, "seed": variant})


@contextlib.contextmanager
def small_fashion_mnist(variant):
    random = np.random.default_rng(variant)
    images = random.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    with mock.patch.object(fashion_mnist, "load", lambda *_: (images, np.arange(6) + variant)):
        yield


def do_convert(rooms, folder, variant):
    from dgmr.teacher.convert import convert

    convert(Teacher(model=f"local-dir:{rooms.teacher(variant)}"), folder / "teacher")


def do_fashion_table(rooms, folder, variant):
    with small_fashion_mnist(variant):
        fashion_table.make(folder / "table" / "table.parquet", folder)


def do_select(rooms, folder, variant):
    sizes = {"n_samples": 5, "shard_size": 2, "shards_per_job": 2, "seed": variant}
    urls = {"urls": "file", "source": "table", "table": "t", "filters": {"max_punsafe": None}}
    config = Data.model_validate(urls | sizes)
    select.select(str(rooms.table(variant).with_suffix(".parquet")), config, folder / "selection")


def do_pack(rooms, folder, variant):
    rows, beside = rooms.selected(variant) / "selection" / "00000.parquet", rooms.pictures(variant)
    given = {"table_folder": beside, "downloaded": None, "image_size": None}
    pack.pack(rows, ["00000", "00001"], folder / "job", **given)


def do_publish(rooms, folder, variant):
    selection = rooms.selected(variant) / "selection" / "selection.json"
    publish.publish([rooms.packed(variant) / "job"], selection, folder / "data")


def do_evaluation(rooms, folder, variant):
    with small_fashion_mnist(variant):
        config = EvaluationData(n_samples=5 + variant)
        evaluation.make(config, 4, folder / "made", folder)


def do_publish_evaluation(rooms, folder, variant):
    publish.publish_evaluation(rooms.evaluation(variant) / "made", folder / "eval")


def do_targets(rooms, folder, variant):
    config = features_config(variant)
    targets.compute(rooms.teacher(variant), rooms.data(variant), SHARDS, config, folder / "targets")


def do_calibration(rooms, folder, variant):
    given = rooms.teacher(variant), rooms.data(variant), features_config(variant)
    calibration.compute(*given, folder / "calibration")


def do_features_publish(rooms, folder, variant):
    work, config = rooms.work(variant), features_config(variant)
    given = [work / "targets"], work / "calibration", config
    features_publish.publish(rooms.teacher(variant), *given, folder / "room")


def do_saliency(rooms, folder, variant):
    given = rooms.teacher(variant), rooms.data(variant), features_config(variant)
    saliency.compute(*given, variant, folder / "saliency")


def do_orders(rooms, folder, variant):
    orders.compute(rooms.teacher(variant), Ordering(), 0, folder / "orders")


def do_refits(rooms, folder, variant):
    given = rooms.teacher(variant), rooms.orders(variant), rooms.room(variant)
    refits.compute(*given, Prune(ratio=1.0), 0, folder / "refits")


def do_sequential_refits(rooms, folder, variant):
    given = rooms.teacher(variant), rooms.orders(variant), rooms.data(variant)
    config = Prune(ratio=1.0, sequential=True)
    refits.compute_sequential(*given, features_config(variant), config, folder / "refits")


def do_assemble(rooms, folder, variant):
    given = rooms.teacher(variant), rooms.orders(variant)
    part = rooms.refits(variant) / "part-0-of-1.json"
    assemble.assemble(*given, [part], Prune(ratio=1.0), folder / "student")


def do_prune_again(rooms, folder, variant):
    given = rooms.parent(variant), rooms.teacher(variant), rooms.orders(variant)
    given = *given, rooms.data(variant), features_config(variant), Prune(ratio=1.5)
    again.prune_again(*given, StagePrune(ratio=1.0), folder / "pruned")


def do_distill(rooms, folder, variant):
    """With a checkpoint after each of three steps, and a step that is skipped."""
    values = {"train": "all", "samples": 12, "batch_size": 4, "lr": 1e-3, "seed": variant}
    rooms_read = (getattr(rooms, n)(variant) for n in ("parent", "teacher", "data", "room"))
    running = Running(workers=0, checkpoint_every_s=0)
    config = Stage.model_validate(values)
    trainer.train("s", *rooms_read, config, folder / "out", folder / "runs", running)


def do_evaluate(rooms, folder, variant):
    given = rooms.parent(variant), rooms.teacher(variant), rooms.data(variant)
    accuracy.evaluate("student", *given, 4, folder / "scores" / "student.json")


def do_gather(rooms, folder, variant):
    score = rooms.parent(variant) / "config.json"
    gather.gather({"teacher": score}, rooms.parent(variant) / "provenance.json", folder / "scores")


def do_report(rooms, folder, variant):
    params = PARAMS | {"prune": {"ratio": 1.0 + variant}}
    results = rooms.folder / "results"
    scores = results / "evaluate" / "full.json"
    shutil.copyfile(scores, kept := rooms.folder / "kept.json")
    try:
        from dgmr.files import read_json

        write_json(scores, read_json(kept) | {"top1": 80.0 + variant})
        page.report(results, STAGES, params, folder / "report", results)
    finally:
        shutil.copyfile(kept, scores)


def do_export(rooms, folder, variant):
    export(rooms.parent(variant), folder / "onnx" / "model.onnx")


STEPS = {name.removeprefix("do_"): do for name, do in globals().items() if name.startswith("do_")}
GOES_ON = {"orders", "refits", "sequential_refits"}
"""They keep what they have done, file by file; a listing, which comes last, says that all is there."""
