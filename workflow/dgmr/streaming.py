"""Models larger than memory, and passes through a model that keep in step."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from dgmr import artefact, weights
from dgmr.mlps import mlps
from dgmr.models import TimmModel

# Of passes in step, the first goes on into the next block while the others still have to leave theirs.
_BLOCKS_AT_ONCE = 2


def streamed(folder: Path, device: torch.device) -> TimmModel:
    """The artefact's model in evaluation mode on ``device``, with the weights of two blocks at most.

    Blocks are the modules that have an MLP: their weights are read when a pass reaches them, and
    dropped when it is further on. What lies outside them stays loaded. All in float32, for passes
    without gradients. The artefact's hash is not checked.
    """
    file = folder / artefact.WEIGHTS
    layout = weights.layout(file)
    model = artefact.skeleton(folder).requires_grad_(False)
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in mlps(model))
    loaded: list[nn.Module] = []

    # The memory of the block that was dropped last: given back and asked for again, it would pile up.
    spare: dict[torch.Size, list[Tensor]] = {}

    def place(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        free = spare.get(tensor.shape)
        room = free.pop() if free else torch.empty(tensor.shape, device=device)
        return room.copy_(tensor)

    def load(module: nn.Module, prefix: str, names: Iterable[str]) -> None:
        tensors = weights.tensors(file, names)
        found = {name.removeprefix(prefix): place(tensor) for name, tensor in tensors}
        spare.clear()
        module.load_state_dict(found, strict=False, assign=True)
        _make_buffers(module, device)

    def enter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        prefix = f"{name}."
        names = [tensor for tensor in layout if tensor.startswith(prefix)]

        def load_block(block: nn.Module, _arguments: tuple[Tensor, ...]) -> None:
            if block in loaded:
                return
            if len(loaded) == _BLOCKS_AT_ONCE:
                for parameter in _dropped(loaded.pop(0)):
                    spare.setdefault(parameter.shape, []).append(parameter)
            load(block, prefix, names)
            loaded.append(block)

        return load_block

    within_blocks = tuple(f"{name}." for name in blocks)
    load(model, "", [name for name in layout if not name.startswith(within_blocks)])
    for name in blocks:
        model.get_submodule(name).register_forward_pre_hook(enter(name))
    return model


Answer = Callable[[str, list[Tensor]], list[Tensor]]


@torch.inference_mode()
def in_step(model: TimmModel, batches: Iterable[Tensor], answer: Answer) -> None:
    """Send all ``batches`` through ``model`` so that none passes an MLP before all have reached it.

    There ``answer`` gets the MLP's name and the inputs ``[..., N]`` of all passes, and gives what the
    MLP is to put out in each of them; the model's own MLPs do not run. Memory holds the hidden
    states of all batches, but what a block needs in between for one batch only.
    """

    def ask(name: str) -> Callable[[Tensor], Tensor]:
        return lambda inputs: getcurrent().parent.switch((name, inputs))

    for name, mlp in mlps(model).items():
        mlp.module.forward = ask(name)
    try:
        passes, asked = [], []
        for batch in batches:
            passes.append(greenlet(model))
            asked.append(passes[-1].switch(batch))
        while passes and not passes[-1].dead:
            name = asked[0][0]
            outputs = answer(name, [inputs for _, inputs in asked])
            asked = [one.switch(output) for one, output in zip(passes, outputs, strict=True)]
    finally:
        for mlp in mlps(model).values():
            del mlp.module.forward


def _make_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that are in no file, such as tables of rotary embeddings, where their modules are loaded."""
    for owner in module.modules():
        buffers = {
            name: found for name, found in owner.named_buffers(recurse=False) if found.is_meta
        }
        if buffers and not any(p.is_meta for p in owner.parameters()):
            for name, buffer in buffers.items():
                owner._buffers[name] = torch.empty_like(buffer, device=device)
            owner.init_non_persistent_buffers()  # type: ignore[operator]


def _dropped(block: nn.Module) -> Iterator[Tensor]:
    """Move the block's parameters to the meta device; what they held."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                yield parameter.data
