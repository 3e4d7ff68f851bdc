"""What of the student learns, by which optimizer, how fast."""

import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from dgmr.answers import Answers
from dgmr.distill.losses import weighted
from dgmr.errors import DgmrError
from dgmr.mlps import blocks, in_range, mlps
from dgmr.models import TimmModel, input_size
from dgmr.params import Features, OnlyBlocks, Stage


def learned(skeleton: TimmModel, config: Stage, features: Features) -> set[str]:
    """Names of the parameters that a stage trains; ``skeleton`` is the student on the meta device.

    Those among ``config.train`` on which the loss depends: a classifier, say, keeps the teacher's weights.

    Raises:
        DgmrError: there is none, or the student has not so many blocks.
    """
    skeleton.requires_grad_(True).zero_grad()
    answers = Answers(skeleton, features)(torch.zeros(1, *input_size(skeleton), device="meta"))
    loss, _ = weighted(config.loss, answers, {n: t.detach() for n, t in answers.items()})
    loss.backward()
    reached = {name for name, p in skeleton.named_parameters() if p.grad is not None}
    found = reached & named(skeleton, config)
    if not found:
        raise DgmrError("no parameter that it names has a part in the stage's loss.")
    return found


def named(model: nn.Module, config: Stage) -> set[str]:
    """Names of the parameters that ``config.train`` names.

    Raises:
        DgmrError: the model has not so many blocks.
    """
    modules: list[nn.Module]
    if isinstance(config.train, OnlyBlocks):
        modules = list(in_range(list(blocks(model).values()), config.train.blocks))
    elif config.train == "all":
        modules = [model]
    else:
        modules = [mlp.module for mlp in mlps(model).values()]
        if config.train == "mlp+norm":
            # timm has norms of its own; only the layers, not blocks that are named after theirs.
            layers = (m for m in model.modules() if not any(True for _ in m.children()))
            modules += [m for m in layers if "Norm" in type(m).__name__]
    chosen = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def optimizer(student: nn.Module, config: Stage) -> Optimizer:
    """AdamW over the parameters of ``student`` that require gradients."""
    found: Optimizer = create_optimizer_v2(
        # Only of a model does timm leave some out of the decay.
        [p for p in student.parameters() if p.requires_grad] if config.decay_all else student,
        "adamw",
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        fused=True,
    )
    return found


def schedule(optimizer: Optimizer, config: Stage, step: int, steps: int) -> None:
    """Set learning rate and weight decay of ``step`` of ``steps``, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps)
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay(config, step, steps)


def learning_rate(config: Stage, step: int, steps: int) -> float:
    """From 0 to ``lr`` in a line, reached at the end of the warm-up; then to ``min_lr`` in a cosine."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return _cosine(config.lr, min(config.min_lr, config.lr), (step - warmup) / (steps - warmup))


def weight_decay(config: Stage, step: int, steps: int) -> float:
    """From ``weight_decay`` to ``end_weight_decay`` in a cosine over the whole stage."""
    if config.end_weight_decay is None:
        return config.weight_decay
    return _cosine(config.weight_decay, config.end_weight_decay, step / steps)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
