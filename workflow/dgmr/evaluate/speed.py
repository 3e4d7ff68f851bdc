"""Images a second of every model, measured side by side in one process."""

import statistics
import time
from pathlib import Path

import torch

from dgmr import artefact
from dgmr.files import write_json
from dgmr.models import device, input_size
from dgmr.params import Evaluate

_WARMUP = 2


@torch.inference_mode()
def measure(models: dict[str, Path], config: Evaluate, output: Path) -> None:
    """Time forward passes of the ``models`` (name to artefact) in turn; write the medians.

    Taking turns lets a noisy machine be noisy for all of them alike, so the ratios hold.
    """
    where = device()
    loaded = {name: artefact.load(folder).to(where) for name, folder in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for repeat in range(_WARMUP + config.speed_repeats):
        for name, model in loaded.items():
            batch = torch.randn(config.speed_batch_size, *input_size(model), device=where)
            _synchronize()
            started = time.perf_counter()
            model(batch)
            _synchronize()
            if repeat >= _WARMUP:
                seconds[name].append(time.perf_counter() - started)
    write_json(
        output,
        {
            "sha256": {
                name: artefact.provenance(folder)["sha256"] for name, folder in models.items()
            },
            "device": str(where),
            "threads": torch.get_num_threads(),
            "batch_size": config.speed_batch_size,
            "repeats": config.speed_repeats,
            "images_per_s": {
                name: config.speed_batch_size / statistics.median(times)
                for name, times in seconds.items()
            },
        },
    )


def _synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
