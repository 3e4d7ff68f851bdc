"""Load a model folder whose MLPs differ in width; needs timm and safetensors alone.

Plain ``timm.create_model("local-dir:<folder>", pretrained=True)`` is enough where all MLPs have the
same width for their dimension. A folder where they do not carries this file::

    from loader import load
    model = load("<folder>")
"""

from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def load(folder: str | Path) -> torch.nn.Module:
    """The folder's model on the CPU, in evaluation mode."""
    weights = Path(folder) / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    fit(model, shapes)
    model.load_state_dict(load_file(weights))
    return model.eval()


def fit(model: torch.nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give the parameters the ``shapes``, by name, that they have in the file; contents are lost."""
    for key, parameter in list(model.named_parameters()):
        if list(parameter.shape) != list(shapes.get(key, parameter.shape)):
            module_name, _, name = key.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, name, torch.nn.Parameter(parameter.new_empty(shapes[key])))
            if isinstance(module, torch.nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif hasattr(module, "normalized_shape"):
                module.normalized_shape = tuple(shapes[key])  # type: ignore[assignment]
