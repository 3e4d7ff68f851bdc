"""Models are timed in turn, and their medians told."""

import itertools

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.evaluate import speed
from dgmr.files import read_json
from dgmr.models import device
from dgmr.params import Evaluate
from dgmr.prune import prune_model

CONFIG = Evaluate(speed_batch_size=3, speed_repeats=5)


@pytest.fixture
def models(tmp_path, teacher):
    artefact.save(tmp_path / "pruned", prune_model(artefact.load(teacher), 1), {})
    return {"teacher": teacher, "pruned": tmp_path / "pruned"}


def test_what_is_told(tmp_path, models):
    speed.measure(models, CONFIG, tmp_path / "speed.json")
    found = read_json(tmp_path / "speed.json")
    rates = found.pop("images_per_s")
    assert rates.keys() == models.keys() and min(rates.values()) > 0
    assert found == {
        "sha256": {name: artefact.provenance(path)["sha256"] for name, path in models.items()},
        "device": str(device()),
        "threads": torch.get_num_threads(),
        "batch_size": 3,
        "repeats": 5,
    }


def test_models_take_turns_and_the_median_counts(tmp_path, models, monkeypatch):
    calls, now = [], 0.0
    # Of passes after the warm-up, the first is slow; the median is 2 s and 0.5 s.
    seconds = {128: 2 * [100] + [50, 2, 1, 2, 3], 32: 2 * [100] + [50, 0.5, 0.5, 0.25, 0.75]}
    seconds = {hidden: iter(times) for hidden, times in seconds.items()}
    load = artefact.load

    def watched(folder):
        model = load(folder)
        hidden = model.blocks[0].mlp.fc1.out_features

        def run(_module, arguments):
            nonlocal now
            assert arguments[0].shape == (3, 3, tiny.SIDE, tiny.SIDE)
            assert torch.is_inference_mode_enabled()
            calls.append(hidden)
            now += next(seconds[hidden])

        model.register_forward_pre_hook(run)
        return model

    monkeypatch.setattr(artefact, "load", watched)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    speed.measure(models, CONFIG, tmp_path / "speed.json")
    assert calls == list(itertools.chain(*[(128, 32)] * 7))
    assert read_json(tmp_path / "speed.json")["images_per_s"] == {"teacher": 1.5, "pruned": 6.0}


def test_damaged_models_are_refused(tmp_path, models):
    tiny.damage(models["pruned"] / "model.safetensors")
    with pytest.raises(DgmrError, match="model.safetensors is not the file"):
        speed.measure(models, CONFIG, tmp_path / "speed.json")
