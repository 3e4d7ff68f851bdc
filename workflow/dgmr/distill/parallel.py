"""Several processes that train as one: torchrun starts them, DDP or FSDP2 keeps them together.

With one process all of this comes to nothing.
"""

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dgmr import models
from dgmr.answers import Answers
from dgmr.errors import DgmrError
from dgmr.mlps import blocks
from dgmr.models import count_parameters

# After a SIGTERM, until torchrun kills what still runs.
_TIME_TO_SAVE_S = 900


class Processes(NamedTuple):
    """Those that train together, as one of them sees them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0


def launch(count: int, nodes: int = 1) -> None:
    """Replace this process by torchrun with ``count`` processes of the same command.

    On several ``nodes``, all of the Slurm job that runs here, srun starts a torchrun on each with its
    share. Returns where there is nothing to be launched: one process, or already one of torchrun's.

    Raises:
        DgmrError: the nodes cannot share the processes, or are not those of a Slurm job; or this
            machine has accelerators, but not so many.
    """
    if count == nodes == 1 or distributed.is_torchelastic_launched():
        return
    share, rest = divmod(count, nodes)
    if rest or not share:
        raise DgmrError(
            f"distill: {nodes} nodes cannot share {count} processes evenly: make the job's gpu (or"
            " distill.processes) a multiple of its nodes."
        )
    if 0 < torch.accelerator.device_count() < share:
        raise DgmrError(
            f"distill: {share} processes want an accelerator each, but this machine has"
            f" {torch.accelerator.device_count()}: lower distill.processes, or the job's gpu."
        )
    srun, meeting = ([], ["--standalone"]) if nodes == 1 else _across(nodes)
    torchrun = ["-m", "torch.distributed.run", *meeting, f"--nproc-per-node={share}"]
    torchrun.append(f"--shutdown-timeout={_TIME_TO_SAVE_S}")
    command = [*srun, sys.executable, *torchrun, "-m", "dgmr", *sys.argv[1:]]
    # They share the threads of this one.
    threads = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // share, 1))}
    os.execvpe(command[0], command, os.environ | threads)  # noqa: S606 - our own command


def _across(nodes: int) -> tuple[list[str], list[str]]:
    """srun's part of the command line and torchrun's, for a torchrun on each node of this job."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or shutil.which("srun") is None:
        raise DgmrError(
            f"distill: {nodes} nodes are for jobs of Slurm, and this is none: leave the resource"
            " nodes at 1."
        )
    # A job's script runs on the first of its nodes, so they meet here.
    with socket.socket() as free:
        free.bind(("", 0))
        here = f"{socket.gethostname()}:{free.getsockname()[1]}"
    # No binding: each torchrun has all cores that the job has on its node.
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={here}"]
    return srun, [*meeting, f"--rdzv-id={job}"]


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join torchrun's other processes, if it started this one."""
    device = models.device()
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Processes(0, 1, device)
        return
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    distributed.init_process_group()
    try:
        yield Processes(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()


def together(answers: Answers, group: Processes, shard_above: int) -> nn.Module:
    """``answers`` for training in all processes: each holds all weights, or above ``shard_above``
    parameters a part of them.

    Of sharded models the parameters have become ``DTensor``s.
    """
    if group.size == 1:
        return answers
    if count_parameters(answers.model) <= shard_above:
        if not any(parameter.requires_grad for parameter in answers.parameters()):
            return answers  # nothing to keep together
        return DistributedDataParallel(answers)
    for block in blocks(answers.model).values():
        fully_shard(block)
    fully_shard(answers)
    return answers


@contextlib.contextmanager
def synced(model: nn.Module, is_last_pass: bool) -> Iterator[None]:
    """Within the block gradients are exchanged in the last of a step's passes alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last_pass)
    if isinstance(model, DistributedDataParallel) and not is_last_pass:
        with model.no_sync():
            yield
    else:
        yield


def summed(values: list[float], group: Processes) -> list[float]:
    """The sums over all processes."""
    if group.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    # Accelerators without float64 are few, and these are numbers to look at.
    tensor = tensor.to(group.device, torch.float32 if group.device.type == "mps" else None)
    distributed.all_reduce(tensor)
    found: list[float] = tensor.tolist()
    return found


def gathered(value: list[tuple[int, int]], group: Processes) -> list[tuple[int, int]]:
    """The lists of all processes, joined."""
    if group.size == 1:
        return value
    found: list[list[tuple[int, int]]] = [[] for _ in range(group.size)]
    distributed.all_gather_object(found, value)
    return [item for part in found for item in part]


def wait_for_all(group: Processes) -> None:
    """Return when all processes came here."""
    if group.size > 1:
        distributed.barrier()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part, on the CPU, in all processes."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def each_whole(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As :func:`whole`, one named tensor after the other; all processes have to go through all."""
    return ((name, whole(tensor)) for name, tensor in tensors)


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """The whole tensor ``value`` as ``like`` lies: this process' part of it, on its device."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        # Every process has read the whole, so none has to send it.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)
