"""The MLPs of a timm model, and which of their tensors belong to which hidden unit.

B: batch, T: tokens, N: inputs and outputs of an MLP, M: its hidden units. A hidden unit owns a row
of the first layer (two where the MLP is gated: gate and value), its entry of the inner norm where
there is one, and a column of fc2.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from timm.layers import AttentionPoolLatent, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from dgmr.errors import DgmrError
from dgmr.loader import fit

T = TypeVar("T")
# By kind of MLP, the layers that read its input. GluMlp (SwiGLUPacked) has gate and value in one:
# unit j owns the rows j and M + j.
_FIRST_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1",),
    GluMlp: ("fc1",),
    SwiGLU: ("fc1_g", "fc1_x"),
}


@dataclass(frozen=True)
class PrunableMlp:
    """An MLP whose hidden units can be ordered, kept and dropped."""

    module: Any
    """A timm ``Mlp``, ``GluMlp`` or ``SwiGLU``; on the meta device where only shapes matter."""
    in_pool_head: bool = False
    """Whether it belongs to an attention-pool head, as SigLIP's does."""

    @property
    def in_features(self) -> int:
        """N."""
        return self.module.get_submodule(self._first_layers[0]).in_features

    @property
    def hidden_features(self) -> int:
        """M: for gated MLPs half the rows of the first layer."""
        return self.module.fc2.in_features

    @property
    def out_features(self) -> int:
        """Outputs of the MLP, as a rule N."""
        return self.module.fc2.out_features

    @property
    def has_bias(self) -> bool:
        """Whether fc2 has a bias."""
        return self.module.fc2.bias is not None

    @property
    def has_norm(self) -> bool:
        """Whether the hidden units pass a norm; pruned, it is taken over the kept ones."""
        return not isinstance(self.module.norm, nn.Identity)

    @property
    def unit_parameters(self) -> int:
        """Parameters that go with a hidden unit."""
        one = self.sliced(self.module.state_dict(), torch.tensor([0]))
        shared = sum(t.numel() for key, t in one.items() if key == "fc2.bias")
        return sum(tensor.numel() for tensor in one.values()) - shared

    @property
    def _first_layers(self) -> tuple[str, ...]:
        return _FIRST_LAYERS[type(self.module)]

    def vectors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What each hidden unit computes from the input: its rows of the first layer, ``[M, N]`` or
        ``[M, 2N]`` (gate, value). ``tensors`` are the MLP's by name; only those weights are looked at.
        """
        weights = [tensors[f"{layer}.weight"] for layer in self._first_layers]
        parts = [rows for w in weights for rows in w.split(self.hidden_features)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def vector_tensors(self) -> list[str]:
        """Names of the tensors that :meth:`vectors` looks at."""
        return [f"{layer}.weight" for layer in self._first_layers]

    def sliced(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """The MLP's ``tensors`` by name, reduced to the hidden units ``kept`` ``[k]``, in that order."""
        found = {}
        for key, tensor in tensors.items():
            if key == "fc2.weight":
                tensor = tensor[:, kept]
            elif key.split(".")[0] in (*self._first_layers, "norm"):
                groups = range(len(tensor) // self.hidden_features)
                tensor = tensor[torch.cat([kept + g * self.hidden_features for g in groups])]
            found[key] = tensor
        return found

    def pruned(self, kept: Tensor) -> "PrunableMlp":
        """A copy with the hidden units ``kept`` alone.

        It computes what the dense MLP does with the other units masked: exactly without an inner
        norm, else with the norm taken over the kept units.
        """
        tensors = self.sliced(self.module.state_dict(), kept)
        module = copy.deepcopy(self.module)
        fit(module, {key: list(tensor.shape) for key, tensor in tensors.items()})
        module.load_state_dict(tensors)
        return PrunableMlp(module.requires_grad_(False), self.in_pool_head)

    def hidden(self, inputs: Tensor) -> Tensor:
        """What enters fc2, ``[tokens, M]``, for ``inputs`` ``[tokens, N]``."""
        return self._without_fc2(inputs)

    def output(self, hidden: Tensor) -> Tensor:
        """``[tokens, N]`` from ``hidden`` ``[tokens, M]``."""
        return self.module.fc2(hidden)

    @cached_property
    def _without_fc2(self) -> nn.Module:
        module = copy.copy(self.module)
        module._modules = {**self.module._modules, "fc2": nn.Identity()}
        return module


def mlps(model: nn.Module) -> dict[str, PrunableMlp]:
    """The MLPs that can be pruned, by module name, in the order of the network.

    Raises:
        DgmrError: there is none, or one is of a kind that cannot be pruned.
    """
    found: dict[str, PrunableMlp] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in _FIRST_LAYERS and not any(
            isinstance(layer, nn.Conv2d) for layer in module.children()
        ):
            for other, mlp in found.items():
                if mlp.module is module:
                    raise DgmrError(
                        f"{_architecture(model)}: {other} and {name} are the same module, which"
                        " cannot be pruned; choose a model whose blocks have MLPs of their own."
                    )
            parent = model.get_submodule(name.rpartition(".")[0])
            found[name] = PrunableMlp(module, isinstance(parent, AttentionPoolLatent))
        elif type(module) in _FIRST_LAYERS or (
            name.rpartition(".")[2] == "mlp" and not isinstance(module, nn.Identity)
        ):
            raise DgmrError(
                f"{_architecture(model)}: {name} is a {type(module).__name__}"
                f"{' of convolutions' if type(module) in _FIRST_LAYERS else ''}, which cannot be"
                f" pruned; choose a model whose blocks have timm's {_kinds()}."
            )
    if not found:
        raise DgmrError(
            f"{_architecture(model)} has no timm {_kinds()}, so there is nothing to prune."
        )
    return found


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have an MLP, by name, in the order of the network; no pool head among them."""
    found = (name for name, mlp in mlps(model).items() if not mlp.in_pool_head)
    return {name: model.get_submodule(name) for name in (n.rpartition(".")[0] for n in found)}


def in_range(found: Sequence[T], first_and_last: tuple[int, int]) -> Sequence[T]:
    """Those of ``found``, one for each block of the student, that belong to a range of blocks.

    Raises:
        DgmrError: there are not so many.
    """
    first, last = first_and_last
    if last >= len(found):
        raise DgmrError(
            f"there are no blocks {first} to {last}; the student's are 0 to {len(found) - 1}."
        )
    return found[first : last + 1]


def widths(model: nn.Module) -> dict[str, int]:
    """Hidden units of every MLP, by module name."""
    return {name: mlp.hidden_features for name, mlp in mlps(model).items()}


@contextmanager
def recorded_mlp_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass puts the MLPs' inputs into the given dict, by module name.

    Inputs are ``[B, T, N]``; Swin's ``[B, H, W, N]`` are flattened to that, a lone token's ``[B, N]`` too.
    """
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            value = arguments[0].detach()
            inputs[name] = value.reshape(len(value), -1, value.shape[-1])

        return record

    hooks = [m.module.register_forward_pre_hook(recorder(n)) for n, m in mlps(model).items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _kinds() -> str:
    *most, last = (kind.__name__ for kind in _FIRST_LAYERS)
    return f"{', '.join(most)} or {last}"


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", {})
    return str(config.get("architecture", type(model).__name__))
