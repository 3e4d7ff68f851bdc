"""The compensated fc2 of every block, on its own file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from dgmr import artefact, weights
from dgmr.errors import DgmrError
from dgmr.files import replaced, write_json
from dgmr.fingerprint import key
from dgmr.images import calibration_images, some_tokens
from dgmr.mlps import PrunableMlp, mlps
from dgmr.models import device
from dgmr.params import Features, Prune
from dgmr.progress import progress
from dgmr.prune import orders as block_orders
from dgmr.prune import widths
from dgmr.prune.block import Block, held_out_images
from dgmr.prune.compensate import Fold, LeastSquares
from dgmr.prune.model import Refit
from dgmr.streaming import in_step, streamed
from dgmr.targets import Manifest


class Plan(NamedTuple):
    """What is to be kept of a model."""

    weights_sha256: str
    found: dict[str, PrunableMlp]
    """On the meta device."""
    kept: dict[str, Tensor]
    """By MLP, of those that lose hidden units."""
    config: Prune

    def origin(self, name: str) -> dict[str, Any]:
        """What an MLP's refit depends on, but for the calibration images."""
        return {
            "weights_sha256": self.weights_sha256,
            "kept": key(self.kept[name].tolist()),
            "ridge": self.config.ridge,
            "sequential": self.config.sequential,
        }


@torch.inference_mode()
def compute(
    teacher: Path, orders: Path, features: Path, config: Prune, part: int, output: Path
) -> None:
    """Refit the MLPs ``part``, ``part + parts``, ... on the teacher's inputs into the folder ``output``.

    Writes ``<mlp>.safetensors`` with ``weight`` ``[N, k]`` and ``bias`` ``[N]``, then
    ``part-<part>-of-<parts>.json`` with the errors before and after. MLPs that lose no hidden unit
    have none; a refit that is there and is of the same weights stays.
    """
    plan = _planned(teacher, orders, config)
    manifest = Manifest(features)
    manifest.check_teacher(plan.weights_sha256)
    report: dict[str, Any] = {}
    names = [name for name in list(plan.found)[part :: config.parts] if name in plan.kept]
    listing = output / f"part-{part}-of-{config.parts}.json"
    listing.unlink(missing_ok=True)  # it vouches for files that may change now
    with progress("refits", len(names), "MLPs") as advance:
        for name in names:
            path = output / f"{name}.safetensors"
            if _about(path, plan.origin(name)) is None:
                block = Block(teacher, name, plan.found[name], manifest)
                dense = block.mlp()
                pruned = dense.pruned(plan.kept[name])
                squares = _squares(pruned)
                for inputs, held_out in block.inputs():
                    _add(squares, dense.module(inputs), pruned, inputs, held_out)
                _save(_solved(squares, name, config), pruned, plan.origin(name), path)
            report[name] = _about(path, plan.origin(name))
            advance(1)
    write_json(listing, report)


def compute_sequential(
    teacher: Path, orders: Path, data: Path, features: Features, config: Prune, output: Path
) -> None:
    """Refit all MLPs in turn, on the inputs they get where those before them are pruned and refitted.

    Aims at what the teacher's MLP says of the teacher's own inputs. Writes what :func:`compute` does,
    as a single part.
    """
    plan = _planned(teacher, orders, config)
    listing = output / "part-0-of-1.json"
    listing.unlink(missing_ok=True)
    write_json(listing, sequential(plan, teacher, data, features, output))


@torch.inference_mode()
def sequential(
    plan: Plan, source: Path, data: Path, features: Features, output: Path
) -> dict[str, Any]:
    """As :func:`compute_sequential`, for a ``plan`` of what is kept of the model artefact ``source``.

    Gives ridge and errors by MLP, and writes no part file.
    """
    where = device()
    model = streamed(source, where)
    batches = [batch.to(where) for batch in calibration_images(data, model, features)]
    report: dict[str, Any] = {}

    def answer(name: str, inputs: list[Tensor]) -> list[Tensor]:
        # The first half of the passes is the source, the second the pruned model.
        taught, own = inputs[: len(batches)], inputs[len(batches) :]
        dense = Block(source, name, plan.found[name]).mlp()
        dense.module.to(where)
        said = [dense.module(value) for value in taught]
        advance(1)
        if name not in plan.kept:
            return said + [dense.module(value) for value in own]
        pruned = dense.pruned(plan.kept[name])
        path = output / f"{name}.safetensors"
        if _about(path, plan.origin(name)) is None:
            squares = _squares(pruned)
            # Each block draws for itself, so that a run that goes on draws what a whole one does.
            seed = int(key(features.calibration.seed, name), 16)
            generator = torch.Generator().manual_seed(seed)
            for batch, both in enumerate(zip(said, own, strict=True)):
                joined = torch.cat(
                    [value.reshape(len(value), -1, value.shape[-1]) for value in both], 2
                )
                joined = some_tokens(joined, features.calibration.tokens, generator)
                of_held_out = held_out_images(batch * features.batch_size, len(joined))
                for held_out in (False, True):
                    tokens = joined[of_held_out == held_out].flatten(0, 1)
                    wanted, given = tokens.split([dense.out_features, dense.in_features], 1)
                    _add(squares, wanted, pruned, given, held_out)
            _save(_solved(squares, name, plan.config), pruned, plan.origin(name), path)
        refit = _load(path)
        pruned.module.fc2.load_state_dict(
            {part: value for part, value in refit._asdict().items() if value is not None}
        )
        report[name] = _about(path, plan.origin(name))
        return said + [pruned.module(value) for value in own]

    with progress("sequential refits", len(plan.found), "MLPs") as advance:
        in_step(model, [*batches, *batches], answer)
    return report


class Refits(Mapping[str, Refit]):
    """The refits in a folder, by MLP; each is read when it is asked for."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._paths = {name: folder / f"{name}.safetensors" for name in names}

    def __getitem__(self, name: str) -> Refit:
        return _load(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _planned(teacher: Path, orders: Path, config: Prune) -> Plan:
    weights_sha256 = artefact.provenance(teacher)["sha256"]
    skeleton = artefact.skeleton(teacher)
    order_of = block_orders.load(orders, weights_sha256)
    return Plan(weights_sha256, mlps(skeleton), widths.kept(skeleton, config, order_of), config)


def _squares(pruned: PrunableMlp) -> LeastSquares:
    return LeastSquares(pruned.hidden_features, pruned.out_features, pruned.has_bias)


def _add(
    squares: LeastSquares, output: Tensor, pruned: PrunableMlp, inputs: Tensor, held_out: bool
) -> None:
    """``output`` ``[tokens, N]`` is the dense MLP's, ``inputs`` ``[tokens, N]`` are the pruned one's."""
    if len(inputs):
        hidden = pruned.hidden(inputs)
        squares.add(hidden, output - pruned.output(hidden), output, held_out)


def _solved(squares: LeastSquares, name: str, config: Prune) -> Fold:
    try:
        return squares.solve(config.ridge)
    except ValueError as error:
        raise DgmrError(f"features.calibration: {name}: {error}") from None


def _save(fold: Fold, pruned: PrunableMlp, origin: dict[str, Any], path: Path) -> None:
    fc2 = pruned.module.fc2
    refit = fold.applied(fc2.weight, fc2.bias)
    tensors = {"weight": refit.weight.cpu().contiguous()}
    if refit.bias is not None:
        tensors["bias"] = refit.bias.cpu()
    about = {
        "ridge": fold.ridge,
        "error_plain": fold.error_plain,
        "error_refit": fold.error_refit,
    }
    with replaced(path) as partial:
        weights.write(partial, tensors, tensors.items(), origin | {"about": about})


def _about(path: Path, origin: dict[str, Any]) -> dict[str, float] | None:
    """Ridge and errors of the refit, or None where there is no readable one of this ``origin``."""
    found = weights.origin(path) or {}
    about: dict[str, float] | None = found.pop("about", None)
    return about if found == origin else None


def _load(path: Path) -> Refit:
    tensors = load_file(path)
    return Refit(tensors["weight"], tensors.get("bias"))
