"""The teacher asked in every step says what the cache holds; cached pixels are those of the images."""

import functools
import shutil

import pytest
import tiny
from dgmr import artefact
from dgmr.distill.trainer import train
from dgmr.errors import DgmrError
from dgmr.files import read_json, write_json
from dgmr.params import Running, Stage

STEPS = 100
EXACT = {"blocks": [0, 1], "patch_tokens": 2}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory, teacher, data):
    folder = tmp_path_factory.mktemp("rooms")
    ways = {
        "float32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "pixels": {"pixels": True},
        "online": {"cache": "none"},
        "asked in bfloat16": {"precision": "bfloat16"},
        "online in bfloat16": {"cache": "none", "precision": "bfloat16"},
    }
    made = {}
    for way, changes in ways.items():
        asked = tiny.features_config(**EXACT, **changes)
        made[way] = tiny.write_features(folder / way, teacher, data, asked)
        if asked.cache == "none":  # so that none can be read
            shutil.rmtree(folder / way / "work" / "targets")
    return made


def config(**changes):
    values = {"train": "all", "samples": 4 * STEPS, "batch_size": 4, "lr": 1e-3}
    return Stage.model_validate(values | {"loss": {"blocks": 0.5}} | changes)


@pytest.fixture(scope="module")
def losses(tmp_path_factory, parent, teacher, data, rooms):
    """Of every step, by room."""
    folder = tmp_path_factory.mktemp("losses")

    @functools.cache
    def losses(way):
        made = parent, teacher, data, rooms[way]
        train("stage", *made, config(), folder / way, folder / "runs", Running(workers=0))
        return [row["loss"] for row in read_json(folder / way / "history.json")]

    return losses


def test_online_the_first_losses_are_those_of_the_float32_cache(losses):
    cached, online = losses("float32"), losses("online")
    assert len(cached) == STEPS
    assert online == pytest.approx(cached, rel=1e-6)
    assert len(set(cached)) == STEPS


def test_online_is_the_bfloat16_cache_but_for_its_rounding(losses):
    cached, online = losses("bfloat16"), losses("online")
    assert cached != online
    # A number is rounded by 2^-9 of itself at most; answers and errors are of one size here.
    assert online == pytest.approx(cached, rel=2**-7)


def test_online_in_bfloat16_is_near_the_cache_asked_in_bfloat16(losses):
    cached, online = losses("asked in bfloat16"), losses("online in bfloat16")
    exact = losses("online")
    near = max(abs(a - b) for a, b in zip(cached, online, strict=True))
    far = max(abs(a - b) for a, b in zip(exact, online, strict=True))
    assert near < far
    assert online == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pixels_give_the_same_bits(place, rooms, workers):
    changes = {"samples": 64, "ema": 0.9}
    for way in ("float32", "pixels"):
        place.features = rooms[way]
        place.train(way, config(**changes), workers=workers)
    assert place.bytes("float32") == place.bytes("pixels")


def test_the_teacher_stays_as_it_is(place, rooms, teacher):
    """A student that is the teacher itself has nothing to learn, and a step leaves the loss at 0."""
    place.features, place.parent = rooms["online"], teacher
    place.train("stage", config(samples=8))
    assert [row["loss"] for row in place.history("stage")] == pytest.approx([0, 0], abs=1e-7)


def test_the_teacher_answers_in_evaluation_mode(place, data):
    """Whatever its own rates of dropout."""
    place.teacher = tiny.write_teacher(place.folder / "teacher")
    about = read_json(place.teacher / "config.json")
    about["model_args"] |= {"proj_drop_rate": 0.3, "drop_path_rate": 0.3}
    write_json(place.teacher / "config.json", about)
    losses = {}
    for cache in ("disk", "none"):
        room = place.folder / cache
        asked = tiny.features_config(cache=cache)
        place.features = tiny.write_features(room, place.teacher, data, asked)
        place.train(f"run-{cache}", config(samples=64, loss={}))
        losses[cache] = [row["loss"] for row in place.history(f"run-{cache}")]
    assert losses["none"] == pytest.approx(losses["disk"], rel=1e-6)


def test_training_asks_the_teacher_in_no_step_where_answers_are_cached(place, rooms, monkeypatch):
    def never(*_):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr("dgmr.distill.learner.Teacher.__call__", never)
    place.features = rooms["float32"]
    place.train("cached", config(samples=8))
    place.features = rooms["online"]
    with pytest.raises(AssertionError, match="was asked"):
        place.train("online", config(samples=8))


def test_online_needs_whole_answers(place, rooms):
    """A block that the student lacks is told, not left out."""
    place.parent = place.folder / "short"
    artefact.save(place.parent, tiny.vit(depth=1), {"stage": "prune"})
    place.features = rooms["online"]
    with pytest.raises(DgmrError, match=r"features\.blocks: there is no block 1; .* are 0 to 0"):
        place.train("out", config(samples=8))
    assert not (place.folder / "out").exists()
