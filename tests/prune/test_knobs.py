"""Every knob of the section prune changes something: a file that is written, or what is planned."""

import pytest
import tiny
from dgmr.params import Prune
from dgmr.prune import orders, refits, saliency
from dgmr.prune.assemble import assemble

BASE = {"ratio": 1.0, "method": "random", "tokens": 40}
KNOBS = {
    # knob: what the two runs have in common beside BASE, and what it is changed to
    "method": ({}, "magnitude"),
    "seed": ({}, 1),
    "tokens": ({"method": "active_energy"}, 20),
    "max_ratio": ({}, 1.5),
    "parts": ({}, 2),
    "ratio": ({}, 0.9),
    "keep": ({"ratio": None, "keep": 0.5}, 0.4),
    "hidden_features": (
        {"ratio": None, "hidden_features": {"blocks.0.mlp": 9}},
        {"blocks.0.mlp": 8},
    ),
    "budget": ({"ratio": None, "budget": 0.8}, 0.7),
    "round_to": ({}, 5),
    "include_pool_head": ({}, False),
    "compensate": ({}, "none"),
    "sequential": ({}, True),
    "ridge": ({"ridge": 1e-3}, 1e-1),
}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Teacher, data, features and saliency of a model with a pool head."""
    folder = tmp_path_factory.mktemp("knobs")
    teacher = tiny.write_teacher(folder / "teacher", tiny.siglip())
    data = tiny.write_data(folder / "data", (10,))
    config = tiny.features_config(calibration={"samples": 10, "tokens": 9}, views={"count": 1})
    features = tiny.write_features(folder, teacher, data, config)
    saliency.compute(teacher, data, config, 0, folder / "saliency")
    return folder, teacher, data, features, config


def written(rooms, folder, config):
    """Content of all tensor files that pruning writes, by name; nothing of the others, which tell times."""
    _, teacher, data, features, calibration = rooms
    for part in range(config.parts):
        orders.compute(teacher, config, part, folder / "orders", features)
    arguments = teacher, folder / "orders"
    if config.sequential:
        refits.compute_sequential(*arguments, data, calibration, config, folder / "refits")
    elif config.compensate == "least_squares":
        for part in range(config.parts):
            refits.compute(*arguments, features, config, part, folder / "refits")
    found = sorted((folder / "refits").glob("part-*.json"))
    assemble(*arguments, found, config, folder / "pruned")
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix == ".safetensors" else None
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_knob_is_in_the_table():
    assert set(KNOBS) == set(Prune.model_fields)


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_changes_what_is_written(tmp_path, rooms, knob):
    common, value = KNOBS[knob]
    base = Prune(**(BASE | common))
    other = Prune(**(BASE | common | {knob: value}))
    assert base != other
    first = written(rooms, tmp_path / "first", base)
    assert written(rooms, tmp_path / "again", base) == first
    second = written(rooms, tmp_path / "second", other)
    model = "pruned/model.safetensors"
    if knob == "parts":  # the same student, in other shares
        assert first.keys() != second.keys() and first[model] == second[model]
    elif knob == "max_ratio":  # longer or shorter orders, of which the student is a slice
        assert first[model] == second[model]
        assert len(first["orders/blocks.0.mlp.safetensors"]) > len(
            second["orders/blocks.0.mlp.safetensors"]
        )
    else:
        assert first[model] != second[model]
