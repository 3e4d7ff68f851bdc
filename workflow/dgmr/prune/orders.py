"""The order of every block's hidden units, on its own file, redone on its own."""

import time
from pathlib import Path

import torch
from safetensors import safe_open

from dgmr import artefact, weights
from dgmr.errors import DgmrError
from dgmr.files import replaced, write_json
from dgmr.mlps import mlps
from dgmr.params import Ordering
from dgmr.progress import progress
from dgmr.prune.block import Block
from dgmr.prune.methods import METHODS, Order, Request
from dgmr.prune.widths import reach
from dgmr.targets import Manifest


@torch.inference_mode()
def compute(
    teacher: Path,
    config: Ordering,
    part: int,
    output: Path,
    features: Path | None = None,
    saliency: Path | None = None,
) -> None:
    """Order the MLPs ``part``, ``part + parts``, ... of the ``teacher`` artefact into ``output``.

    Writes ``<mlp>.safetensors`` with ``indices`` and ``gains`` up to ``max_ratio`` times the embed
    dim, then ``part-<part>-of-<parts>.json``, which lists them and tells the seconds of selecting. A
    file that is there and was made of the same weights in the same way stays. ``features`` is the
    features room, for methods that look at calibration inputs; ``saliency`` the folder of scores, for
    ``taylor``.
    """
    weights_sha256 = artefact.provenance(teacher)["sha256"]
    manifest = None if features is None else Manifest(features)
    if manifest is not None:
        manifest.check_teacher(weights_sha256)
    blocks = list(mlps(artefact.skeleton(teacher)).items())[part :: config.parts]
    origin = {
        "weights_sha256": weights_sha256,
        "method": config.method,
        "max_ratio": str(config.max_ratio),
        "seed": str(config.seed),
        "tokens": str(config.tokens),
    }
    seconds = 0.0
    stale = [(n, mlp) for n, mlp in blocks if weights.origin(output / f"{n}.safetensors") != origin]
    listing = output / f"part-{part}-of-{config.parts}.json"
    listing.unlink(missing_ok=True)  # it vouches for files that may change now
    with progress("orders", len(stale), "MLPs") as advance:
        for name, mlp in stale:
            started = time.monotonic()
            block = Block(teacher, name, mlp, manifest, saliency)
            request = Request(reach(mlp, config.max_ratio), config.seed, config.tokens)
            try:
                order = METHODS[config.method](block, request)
            except ValueError as error:
                raise DgmrError(f"{teacher / artefact.WEIGHTS}: {name}: {error}") from None
            seconds += time.monotonic() - started
            with replaced(output / f"{name}.safetensors") as partial:
                named = order._asdict()
                weights.write(partial, named, named.items(), origin)
            advance(1)
    listed = {"blocks": [name for name, _ in blocks], "origin": origin, "seconds": seconds}
    write_json(listing, listed)


def load(folder: Path, weights_sha256: str) -> dict[str, Order]:
    """The orders in ``folder`` by MLP name.

    Raises:
        DgmrError: one is of other weights.
    """
    orders = {}
    for path in sorted(folder.glob("*.safetensors")):
        origin = weights.origin(path)
        if origin is None or origin["weights_sha256"] != weights_sha256:
            raise DgmrError(
                f"{path} is damaged or an order of other weights than the teacher's: delete it and"
                " run snakemake again."
            )
        with safe_open(path, framework="pt") as file:
            orders[path.stem] = Order(file.get_tensor("indices"), file.get_tensor("gains"))
    return orders
