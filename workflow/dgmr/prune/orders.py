"""The order of every block's hidden neurons, on its own file, redone on its own."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import ORIGIN, replaced, write_json
from dgmr.models import mlps
from dgmr.prune.gram_schmidt import Order, gram_schmidt


def compute(teacher: Path, max_ratio: float, part: int, parts: int, output: Path) -> None:
    """Order the MLPs ``part``, ``part + parts``, ... of the ``teacher`` artefact into ``output``.

    Writes ``<mlp>.safetensors`` with ``indices`` and ``residual_norms`` up to ``max_ratio`` times
    the embed dim, then ``part-<part>-of-<parts>.json``, which lists them. A file that is there and was made of
    the same weights stays.
    """
    weights_sha256 = artefact.provenance(teacher)["sha256"]
    names = list(mlps(artefact.skeleton(teacher)))[part::parts]
    origin = {"weights_sha256": weights_sha256, "max_ratio": str(max_ratio)}
    for name in names:
        path = output / f"{name}.safetensors"
        if _origin(path) == origin:
            continue
        with safe_open(teacher / artefact.WEIGHTS, framework="pt") as weights:
            weight = weights.get_tensor(f"{name}.fc1.weight")
        try:
            order = gram_schmidt(weight, min(len(weight), int(max_ratio * weight.shape[1])))
        except ValueError as error:
            raise DgmrError(f"{teacher / artefact.WEIGHTS}: {name}.fc1.weight: {error}") from None
        with replaced(path) as partial:
            save_file(order._asdict(), partial, metadata={ORIGIN: json.dumps(origin)})
    write_json(output / f"part-{part}-of-{parts}.json", {"blocks": names, "origin": origin})


def load(folder: Path, weights_sha256: str) -> dict[str, Order]:
    """The orders in ``folder`` by MLP name.

    Raises:
        DgmrError: one is of other weights.
    """
    orders = {}
    for path in sorted(folder.glob("*.safetensors")):
        origin = _origin(path)
        if origin is None or origin["weights_sha256"] != weights_sha256:
            raise DgmrError(
                f"{path} is damaged or an order of other weights than the teacher's: delete it and"
                " run snakemake again."
            )
        with safe_open(path, framework="pt") as file:
            orders[path.stem] = Order(file.get_tensor("indices"), file.get_tensor("residual_norms"))
    return orders


def _origin(path: Path) -> dict[str, str] | None:
    """What the order was made of, or None where there is no readable file."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = json.loads(file.metadata()[ORIGIN])
            return found
    except Exception:  # noqa: BLE001 - safetensors raises its own and OSError; all mean "make it anew"
        return None
