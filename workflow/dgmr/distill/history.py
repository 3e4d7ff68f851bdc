"""The history of a stage: about a hundred rows of means since the row before."""

import math
import time
from typing import Any

_ROWS = 100


class History:
    """Rows of step, samples, lr, loss, its terms, and images_per_s; skipped steps count for none."""

    def __init__(self, steps: int, saved: dict[str, Any] | None = None) -> None:
        """Of a stage of ``steps``; ``saved`` is what :meth:`state` gave."""
        self._rows_every = math.ceil(steps / _ROWS)
        saved = saved or {}
        self._rows: list[dict[str, Any]] = saved.get("rows", [])
        self._sums: dict[str, float] = saved.get("sums", {})
        self._steps: int = saved.get("steps", 0)
        self._images: int = saved.get("images", 0)
        self._seconds: float = saved.get("seconds", 0.0)
        self._since = time.perf_counter()

    def add(self, values: dict[str, float], images: int) -> None:
        """A step's loss and terms, which saw ``images``."""
        self._steps += 1
        self._images += images
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def end_step(self, step: int, samples: int, lr: float) -> None:
        """Close a row where it is time; ``step`` steps and ``samples`` are done, skipped ones too."""
        if step % self._rows_every == 0:
            self._close_row(step, samples, lr)

    def finished(self, step: int, samples: int, lr: float) -> list[dict[str, Any]]:
        """All rows, the last of which may stand for fewer steps."""
        if self._steps:
            self._close_row(step, samples, lr)
        return self._rows

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "rows": self._rows,
            "sums": self._sums,
            "steps": self._steps,
            "images": self._images,
            "seconds": self._seconds + time.perf_counter() - self._since,
        }

    def _close_row(self, step: int, samples: int, lr: float) -> None:
        if self._steps:
            means = {name: total / self._steps for name, total in self._sums.items()}
            seconds = self._seconds + time.perf_counter() - self._since
            about = {"step": step, "samples": samples, "lr": lr}
            self._rows.append({**about, **means, "images_per_s": self._images / seconds})
        self._sums, self._steps, self._images, self._seconds = {}, 0, 0, 0.0
        self._since = time.perf_counter()
