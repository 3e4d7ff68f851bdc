"""Second-order saliency of every hidden unit, for the method ``taylor``.

How much do the teacher's features move if unit j's activation is scaled by 1 + m? To second order the
squared distance is m^2 E|d features / d m|^2, a Gauss-Newton diagonal. With a random probe r ~ N(0, 1)
for each feature, E_r (d(r . features) / dm)^2 is the same, and one backward pass gives it for all units:
d(r . features) / dm_j = sum over tokens of a_j * d(r . features) / da_j, image by image. (A first-order
score on the distillation loss is exactly zero at the dense model, where that loss is least.)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dgmr import artefact, weights
from dgmr.files import replaced_folder
from dgmr.images import calibration_images, count_of
from dgmr.mlps import mlps
from dgmr.models import device, outputs
from dgmr.params import Features
from dgmr.progress import progress


def compute(teacher: Path, data: Path, features: Features, seed: int, output: Path) -> None:
    """Write ``<mlp>.safetensors`` with ``scores`` ``[M]`` float64 for every MLP to the folder ``output``.

    Looks at the calibration images.
    """
    where = device()
    model = artefact.load(teacher).to(where).requires_grad_(False)
    images = calibration_images(data, model, features)
    generator = torch.Generator().manual_seed(seed)
    activations: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
        def record(_fc2: nn.Module, arguments: tuple[Tensor]) -> Tensor:
            (hidden,) = arguments
            activations[name] = hidden if hidden.requires_grad else hidden.requires_grad_()
            return activations[name]

        return record

    scores: dict[str, Tensor] = {}
    count = 0
    for name, mlp in mlps(model).items():
        mlp.module.fc2.register_forward_pre_hook(recorder(name))
    with progress("saliency", count_of(images)) as advance:
        for batch in images:
            said = outputs(model, batch.to(where))
            probed = sum((_probe(part, generator) * part).sum() for part in said)
            assert isinstance(probed, Tensor)
            gradients = torch.autograd.grad(probed, list(activations.values()))
            for (name, hidden), gradient in zip(activations.items(), gradients, strict=True):
                moved = (
                    (hidden.detach() * gradient).reshape(len(batch), -1, hidden.shape[-1]).sum(1)
                )
                scores[name] = scores.get(name, 0) + moved.double().square().sum(0).cpu()
            count += len(batch)
            advance(len(batch))
    origin = {"teacher_sha256": artefact.provenance(teacher)["sha256"]}
    with replaced_folder(output) as folder:
        for name, total in scores.items():
            named = {"scores": total / count}
            weights.write(folder / f"{name}.safetensors", named, named.items(), origin)


def _probe(features: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(features.shape, generator=generator).to(features)
