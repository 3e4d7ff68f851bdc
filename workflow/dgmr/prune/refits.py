"""The compensated fc2 of every block, on its own file."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import Mlp

from dgmr import artefact
from dgmr.files import replaced, write_json
from dgmr.models import mlps
from dgmr.prune import orders as block_orders
from dgmr.prune.compensate import LeastSquares, Refit
from dgmr.targets import Manifest


def compute(
    teacher: Path,
    orders: Path,
    features: Path,
    ratio: float,
    ridge: float,
    part: int,
    parts: int,
    output: Path,
) -> None:
    """Refit the MLPs ``part``, ``part + parts``, ... for ``ratio`` into the folder ``output``.

    Writes ``<mlp>.safetensors`` with ``weight`` ``[N, k]`` and ``bias`` ``[N]``, then
    ``part-<part>-of-<parts>.json`` with the errors before and after.
    """
    weights_sha256 = artefact.provenance(teacher)["sha256"]
    order_of = block_orders.load(orders, weights_sha256)
    manifest = Manifest(features)
    manifest.check_teacher(weights_sha256)
    errors = {}
    for name, skeleton in list(mlps(artefact.skeleton(teacher)).items())[part::parts]:
        mlp = _with_weights(skeleton, teacher, name)
        kept = order_of[name].indices[: int(ratio * mlp.fc1.in_features)]
        squares = LeastSquares(mlp, kept)
        with safe_open(manifest.calibration(name), framework="pt") as file:
            squares.add(file.get_tensor("inputs"))
        refit = squares.solve(ridge)
        tensors = {"weight": refit.weight.contiguous()}
        if refit.bias is not None:
            tensors["bias"] = refit.bias
        with replaced(output / f"{name}.safetensors") as partial:
            save_file(tensors, partial)
        errors[name] = {"error_plain": refit.error_plain, "error_refit": refit.error_refit}
    write_json(output / f"part-{part}-of-{parts}.json", errors)


def load(folder: Path, errors: dict[str, dict[str, float]]) -> dict[str, Refit]:
    """The refits in ``folder`` by MLP, with the ``errors`` that the parts' JSON files told."""
    refits = {}
    for name, error in errors.items():
        tensors = load_file(folder / f"{name}.safetensors")
        refits[name] = Refit(tensors["weight"], tensors.get("bias"), **error)
    return refits


def _with_weights(mlp: Mlp, teacher: Path, name: str) -> Mlp:
    """The MLP with its weights; no other tensor of the checkpoint is read."""
    with safe_open(teacher / artefact.WEIGHTS, framework="pt") as weights:
        mlp.load_state_dict(
            {key: weights.get_tensor(f"{name}.{key}") for key in mlp.state_dict()}, assign=True
        )
    return mlp.eval().requires_grad_(False)
