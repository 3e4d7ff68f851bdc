"""The student while it learns: what a step does to it, and all of its state."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dgmr.answers import Answers
from dgmr.distill.learning import learned, optimizer, schedule
from dgmr.distill.losses import weighted
from dgmr.distill.pairs import Batch
from dgmr.distill.parallel import Processes, laid_out_as, summed, synced, together, whole
from dgmr.models import TimmModel, autocast
from dgmr.params import Features, Stage
from dgmr.views import ViewTransform

_STUDENT, _OPTIMIZER, _EMA = "student/", "optimizer/", "ema/"


class Measured(NamedTuple):
    """What a step found, before anything was changed."""

    values: dict[str, float]
    """The loss and its terms, means over all images of the step."""
    gradient_norm: float
    asks: dict[str, bool]
    """Whether any process asked for these."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; all processes agree."""
        return math.isfinite(self.values["loss"]) and math.isfinite(self.gradient_norm)


class Teacher:
    """The teacher, asked in every step: its answers are those that the cache would hold, unrounded."""

    def __init__(
        self, model: TimmModel, features: Features, group: Processes, shard_above: int
    ) -> None:
        model.requires_grad_(False)
        self.model = together(Answers(model.to(group.device), features), group, shard_above)
        self.precision = features.precision

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Its answers to normalised ``images`` ``[B, C, H, W]``."""
        with autocast(images.device, self.precision):
            answers: dict[str, Tensor] = self.model(images)
        return answers


class Learner:
    """A student that learns as a stage says, in all processes alike."""

    def __init__(
        self,
        student: TimmModel,
        skeleton: TimmModel,
        config: Stage,
        features: Features,
        transform: ViewTransform,
        group: Processes,
        shard_above: int,
    ) -> None:
        """``skeleton``: the student on the meta device."""
        self.config, self.transform, self.group = config, transform, group
        names = learned(skeleton, config, features)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in names)
        if config.grad_checkpointing:
            student.set_grad_checkpointing(True)
        self.student: nn.Module = student.to(group.device).train()
        self._run = together(Answers(student, features), group, shard_above)
        found = self.student.named_parameters()
        self._trained = {n: p for n, p in found if p.requires_grad}
        self.optimizer = optimizer(student, config)
        self._ema: dict[str, Tensor] = {}
        if config.ema is not None:
            self._ema = {n: p.detach().clone() for n, p in self._trained.items()}
            self._average = get_ema_multi_avg_fn(config.ema)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def measure(self, batch: Batch, teacher: Teacher | None, asks: Mapping[str, bool]) -> Measured:
        """Forward and backward passes of this process' share of a step; gradients are there after it."""
        self.optimizer.zero_grad(set_to_none=True)
        device, passes = self.group.device, self.config.accumulate
        sums: dict[str, float] = {}
        pixels = batch.pixels.tensor_split(passes)
        cached = {name: tensor.tensor_split(passes) for name, tensor in batch.answers.items()}
        for index, part in enumerate(pixels):
            images = self.transform.normalised(part.to(device))
            if teacher is None:
                said = {name: parts[index].to(device) for name, parts in cached.items()}
            else:
                said = teacher(images)
            with synced(self._run, is_last_pass=index == passes - 1):
                with autocast(device, self.config.precision):
                    answers = self._run(images)
                loss, terms = weighted(self.config.loss, answers, said)
                # The mean over the step's images; gradients are averaged over processes.
                share = len(part) / self.config.batch_size
                (loss * share * self.group.size).backward()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        largest = self.config.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self._trained.values(), largest)
        totals = summed([*sums.values(), *map(float, asks.values())], self.group)
        values = dict(zip(sums, totals, strict=False))
        asked = [total > 0 for total in totals[len(sums) :]]
        return Measured(values, whole(norm).item(), dict(zip(asks, asked, strict=True)))

    def update(self, step: int, steps: int) -> None:
        """Take the step, counted from 0, along the gradients that :meth:`measure` left."""
        schedule(self.optimizer, self.config, step, steps)
        self.optimizer.step()
        if self._ema:
            parameters = [parameter.detach() for parameter in self._trained.values()]
            self._average(list(self._ema.values()), parameters, 0)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that changes, by name; of sharded tensors this process' part."""
        for name, tensor in self.student.state_dict().items():
            yield _STUDENT + name, tensor
        for name, parameter in self._trained.items():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{_OPTIMIZER}{part}/{name}", value
        for name, tensor in self._ema.items():
            yield _EMA + name, tensor

    @torch.no_grad()
    def load(self, state: Iterator[tuple[str, Tensor]]) -> None:
        """Become what :meth:`state` told, whole tensors by name."""
        student = self.student.state_dict()
        for name, value in state:
            if name.startswith(_STUDENT):
                like = student[name.removeprefix(_STUDENT)]
                like.copy_(laid_out_as(value, like))
            elif name.startswith(_EMA):
                like = self._ema[name.removeprefix(_EMA)]
                like.copy_(laid_out_as(value, like))
            else:
                part, of = name.removeprefix(_OPTIMIZER).split("/", 1)
                parameter = self._trained[of]
                self.optimizer.state[parameter][part] = laid_out_as(value, parameter)

    def result(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the stage leaves, by name: where there is an average, that."""
        for name, tensor in self.student.state_dict().items():
            yield name, self._ema.get(name, tensor)
