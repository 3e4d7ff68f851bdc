"""Training checkpoints: kept, verified, passed by when damaged, met by the same run alone."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.distill import checkpoints
from dgmr.distill.learner import Learner
from dgmr.distill.pairs import PairOrder
from dgmr.distill.parallel import Processes
from dgmr.files import read_json, write_json
from dgmr.params import Stage
from dgmr.prune import prune_model
from safetensors.torch import load_file

ALONE = Processes(0, 1, torch.device("cpu"))


def config(**changes):
    values = {"train": "all", "samples": 40, "batch_size": 4, "lr": 1e-3, "ema": 0.9}
    return Stage.model_validate(values | changes)


class Crashed(Exception):
    pass


@pytest.fixture
def crash(place, monkeypatch):
    """Train, with a checkpoint after every step, until a step begins that is not reached."""

    def crash(name, at, **running):
        measure = Learner.measure
        left = [at]

        def measured(self, *arguments):
            if not left[0]:
                raise Crashed
            left[0] -= 1
            return measure(self, *arguments)

        with monkeypatch.context() as patched, pytest.raises(Crashed):
            patched.setattr(Learner, "measure", measured)
            place.train(name, config(), **({"checkpoint_every_s": 0} | running))

    return crash


@pytest.fixture
def begins(monkeypatch):
    """Steps at which the runs from here on begin."""
    found = []
    pairs = PairOrder.pairs
    monkeypatch.setattr(
        PairOrder, "pairs", lambda self, start: (found.append(start // 4), pairs(self, start))[1]
    )
    return found


def test_the_two_newest_are_kept_and_the_last_when_it_is_done(place, crash):
    crash("run", 1)
    assert place.steps("run") == [1]
    crash("run", 5)
    assert place.steps("run") == [5, 6]
    place.train("run", config(), checkpoint_every_s=0)
    assert place.steps("run") == [10]


def test_none_is_written_before_its_time(place, crash):
    crash("run", 9, checkpoint_every_s=300)
    assert not list(place.run_folder("run").glob("step-*"))


def test_what_is_saved_is_student_optimizer_and_average(place, crash):
    crash("run", 3)
    folder = place.run_folder("run") / "step-00000003"
    assert {path.name for path in folder.iterdir()} == {"state.safetensors", "state.json"}
    tensors = load_file(folder / "state.safetensors")
    student = artefact.load(place.parent).state_dict()
    trained = student.keys() - {"head.weight", "head.bias"}
    expected = {f"student/{name}" for name in student} | {f"ema/{name}" for name in trained}
    parts = ("step", "exp_avg", "exp_avg_sq")
    expected |= {f"optimizer/{part}/{name}" for name in trained for part in parts}
    assert tensors.keys() == expected
    assert tensors["optimizer/step/norm.weight"] == 3
    moved = tensors["student/norm.weight"] - student["norm.weight"]
    averaged = tensors["ema/norm.weight"] - student["norm.weight"]
    assert 0 < averaged.norm() < moved.norm()


def test_nothing_there_is_a_pickle(place, crash):
    crash("run", 3)
    files = [path for path in place.run_folder("run").rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # pickle; torch.save's zip
        json.loads(content) if path.suffix == ".json" else load_file(path)


@pytest.fixture
def whole(place):
    place.train("whole", config())
    return place.bytes("whole")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def turned(path):
    """A bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncated,
    "emptied": emptied,
    "a bit turned": turned,
    "the last bit turned": tiny.damage,
    "deleted": lambda path: path.unlink(),
}
FILES = ("state.safetensors", "state.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_passed_by(place, crash, begins, whole, caplog, file, damage):
    crash("run", 6)
    newest = place.run_folder("run") / "step-00000006"
    DAMAGES[damage](newest / file)
    begins.clear()
    with caplog.at_level(logging.WARNING):
        place.train("run", config())
    assert begins == [5]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{newest} is damaged; the checkpoint before it is taken."
    assert place.bytes("run") == whole


def test_no_byte_of_what_is_said_about_it_may_change(place, crash):
    """History and skipped steps are as precious as the tensors."""
    crash("run", 2)
    run = place.run_folder("run")
    path = run / "step-00000002" / "state.json"
    content, about = path.read_bytes(), checkpoints.newest(run).about
    for index in range(0, len(content), 7):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        found = checkpoints.newest(run)
        where = bytes(changed[max(index - 20, 0) : index + 20])
        assert found.step == 1 or found.about == about, where


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_both_are_damaged_the_run_starts_anew(place, crash, begins, whole, caplog, damage):
    crash("run", 6)
    for number, folder in enumerate(sorted(place.run_folder("run").glob("step-*"))):
        DAMAGES[damage](folder / FILES[number])
    begins.clear()
    with caplog.at_level(logging.WARNING):
        place.train("run", config())
    assert begins == [0]
    assert len(caplog.records) == 2
    assert place.bytes("run") == whole


def test_a_half_written_one_is_ignored(place, crash, begins, whole, caplog):
    crash("run", 6)
    run = place.run_folder("run")
    shutil.copytree(run / "step-00000006", run / "step-00000009.partial")
    truncated(run / "step-00000009.partial" / "state.safetensors")
    (run / "step-00000008.partial").mkdir()
    begins.clear()
    with caplog.at_level(logging.WARNING):
        place.train("run", config())
    assert begins == [6] and not caplog.records
    assert place.bytes("run") == whole


def test_what_a_killed_writer_left_does_not_pile_up(place, crash):
    """Half-written checkpoints are as large as whole ones."""
    crash("run", 6)
    run = place.run_folder("run")
    (run / "step-00000099.partial").mkdir()
    place.train("run", config())
    assert [path.name for path in run.glob("step-*")] == ["step-00000010"]


def test_a_finished_run_ends_at_once_when_asked_again(place, monkeypatch):
    place.train("run", config())
    first, history = place.bytes("run"), place.history("run")
    shutil.rmtree(place.folder / "run")

    def never(*_):
        raise AssertionError("a step was done")

    monkeypatch.setattr(Learner, "measure", never)
    place.train("run", config())
    assert place.bytes("run") == first and place.history("run") == history
    assert place.steps("run") == [10]


def test_a_checkpoint_that_does_not_read_back_is_refused(tmp_path, monkeypatch):
    tensors = [("student/a", torch.ones(3))]
    checkpoints.save(tmp_path, 1, tensors, {}, ALONE)
    monkeypatch.setattr(checkpoints, "sha256", lambda _: "other")
    with pytest.raises(checkpoints.DgmrError, match="does not read back as it was written"):
        checkpoints.save(tmp_path, 2, tensors, {}, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def other_parent(place):
    place.parent = place.folder / "other"
    artefact.save(place.parent, prune_model(artefact.load(place.teacher), 0.6), {})


def other_teacher(place):
    place.teacher = tiny.write_teacher(place.folder / "other", tiny.vit(seed=1))
    other_asked(place)


def other_asked(place, **changes):
    room = place.folder / "other-features"
    asked = tiny.features_config(**changes)
    place.features = tiny.write_features(room, place.teacher, place.data, asked)


def other_data(place):
    place.data = tiny.write_data(place.folder / "data", first=1)
    other_asked(place)


def same_weights_with_dropout(place):
    shutil.copytree(place.parent, place.folder / "dropping")
    place.parent = place.folder / "dropping"
    about = read_json(place.parent / "config.json")
    about["model_args"]["proj_drop_rate"] = 0.1
    write_json(place.parent / "config.json", about)


OTHERS = {
    "parent": other_parent,
    "the parent's arguments": same_weights_with_dropout,
    "teacher": other_teacher,
    "data": other_data,
    "half precision": lambda place: other_asked(place, dtype="bfloat16"),
    "fewer tokens": lambda place: other_asked(place, patch_tokens=2),
    "more blocks": lambda place: other_asked(place, blocks=[0]),
    "online": lambda place: other_asked(place, cache="none"),
    "one view": lambda place: other_asked(place, views={**tiny.VIEWS, "count": 1}),
    "views' seed": lambda place: other_asked(place, views={**tiny.VIEWS, "seed": 9}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_of_other_things_is_another_run(place, begins, what):
    place.train("first", config())
    before = set(place.runs("first").iterdir())
    OTHERS[what](place)
    begins.clear()
    place.train("second", config(), runs=place.runs("first"))
    assert begins == [0]
    assert len(set(place.runs("first").iterdir()) - before) == 1


CHANGES = {
    "lr": 2e-3,
    "samples": 44,
    "batch_size": 5,
    "seed": 1,
    "ema": 0.8,
    "train": "mlp",
    "precision": "bfloat16",
    "accumulate": 2,
    "loss": {"pooled": 2},
    "end_weight_decay": 0.2,
}


def test_a_run_of_another_config_is_another_run(place, begins):
    place.train("run", config())
    begins.clear()
    for key, value in CHANGES.items():
        place.train("run", config(**{key: value}))
    assert begins == [0] * len(CHANGES)
    assert len(list(place.runs("run").iterdir())) == 1 + len(CHANGES)


RUNNING = [{"workers": 2}, {"checkpoint_every_s": 0}, {"max_bad_steps": 3}, {"shard_above": 0}]


@pytest.mark.parametrize("running", RUNNING)
def test_how_a_run_is_run_is_no_part_of_it(place, crash, begins, whole, running):
    crash("run", 6)
    begins.clear()
    place.train("run", config(), **running)
    assert begins and set(begins) == {6}
    assert place.bytes("run") == whole
