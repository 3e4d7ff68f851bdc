"""One stage of distillation: the student learns to say what the frozen teacher said."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dgmr import artefact
from dgmr.distill.losses import weighted
from dgmr.distill.pairs import PairOrder, Pairs
from dgmr.errors import DgmrError
from dgmr.mlps import mlps
from dgmr.models import Outputs, device, loader_workers, outputs
from dgmr.params import Stage
from dgmr.progress import progress
from dgmr.targets import Manifest

HISTORY = "history.json"
_HISTORY_ROWS = 100


def train(
    name: str,
    parent: Path,
    teacher: Path,
    data: Path,
    features: Path,
    config: Stage,
    output: Path,
) -> None:
    """Train the model artefact ``parent`` as ``config`` says; write the artefact ``output``.

    With it goes ``history.json``: about a hundred rows of step, samples, loss, its terms (means
    since the row before), lr and images_per_s.

    Raises:
        DgmrError: the features are another teacher's, or the loss is no finite number any more.
    """
    Manifest(features).check_teacher(artefact.provenance(teacher)["sha256"])
    torch.manual_seed(config.seed)
    where = device()
    student = artefact.load(parent).to(where).train()
    trained = _freeze_all_but(student, config.train)
    pairs = Pairs(data, features, student)
    order = PairOrder(len(pairs.images), pairs.views.count, config.samples, config.seed)
    loader = DataLoader(
        pairs, config.batch_size, sampler=order, num_workers=loader_workers(), drop_last=True
    )
    optimizer, schedule = _optimizer(student, config, steps=len(loader))
    history = _History(rows_every=math.ceil(len(loader) / _HISTORY_ROWS))

    with progress(f"distill {name}", len(loader) * config.batch_size) as advance:
        for step, (images, said) in enumerate(loader, start=1):
            schedule.step_update(step)
            with torch.autocast(where.type, torch.bfloat16, config.precision == "bfloat16"):
                answer = outputs(student, images.to(where))
            loss, terms = weighted(config.loss, answer, Outputs(*(t.to(where) for t in said)))
            if not math.isfinite(loss.item()):
                raise DgmrError(
                    f"distill.stages.{name}: the loss is {loss.item()} at step {step}:"
                    " lower lr, or train in float32."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(trained, config.clip_grad)
            optimizer.step()
            history.add(step, len(images), optimizer.param_groups[0]["lr"], loss, terms)
            advance(len(images))

    artefact.save(
        output,
        student.requires_grad_(True).eval().cpu(),
        {
            "stage": f"distill {name}",
            "parent_sha256": artefact.provenance(parent)["sha256"],
            "config": config.model_dump(mode="json"),
            "samples": len(loader) * config.batch_size,
        },
        {HISTORY: history.finished()},
    )


def _freeze_all_but(student: nn.Module, what: str) -> list[nn.Parameter]:
    """Let only the named parameters learn; return them."""
    if what == "mlp":
        student.requires_grad_(False)
        for mlp in mlps(student).values():
            mlp.module.requires_grad_(True)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def _optimizer(
    student: nn.Module, config: Stage, steps: int
) -> tuple[Optimizer, CosineLRScheduler]:
    """AdamW; its learning rate rises from 0 in a line, then falls in a cosine, in all ``steps``."""
    optimizer = create_optimizer_v2(
        student, "adamw", lr=config.lr, weight_decay=config.weight_decay
    )
    warmup = round(config.warmup * steps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup, 1),
        lr_min=min(config.min_lr, config.lr),
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return optimizer, schedule


class _History:
    """Means of the loss and its terms over every ``rows_every`` steps."""

    def __init__(self, rows_every: int) -> None:
        self.rows_every = rows_every
        self.rows: list[dict[str, Any]] = []
        self._clear()
        self.samples = 0

    def _clear(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps, self._images, self._since = 0, 0, time.perf_counter()

    def add(
        self, step: int, images: int, lr: float, loss: Tensor, terms: dict[str, Tensor]
    ) -> None:
        self._steps += 1
        self._images += images
        self.samples += images
        for name, value in {"loss": loss, **terms}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item()
        self._last = {"step": step, "samples": self.samples, "lr": lr}
        if self._steps == self.rows_every:
            self._close_row()

    def _close_row(self) -> None:
        means = {name: total / self._steps for name, total in self._sums.items()}
        speed = self._images / (time.perf_counter() - self._since)
        self.rows.append({**self._last, **means, "images_per_s": speed})
        self._clear()

    def finished(self) -> list[dict[str, Any]]:
        """All rows, the last of which may stand for fewer steps."""
        if self._steps:
            self._close_row()
        return self.rows
