"""Training checkpoints: all it takes to go on as if nothing had happened.

::

    work/distill/<key of the run>/
      step-00001200/          after 1,200 steps
        state.safetensors     student, optimizer, average of the weights
        state.json            the hash of that, the history, the skipped steps, and a hash of these
      bad_steps.json          pairs of steps that were skipped, where there are any
      training.lock           while it is trained: by whom

The two newest are kept. Random numbers and the learning rate are functions of the step, and the order
of the pairs one of their position, so none of them has to be saved. Nothing here depends on how many
processes train: the files hold whole tensors.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dgmr import weights
from dgmr.distill.parallel import Processes, each_whole, wait_for_all
from dgmr.errors import DgmrError
from dgmr.files import read_json, replaced_folder, sha256, write_json
from dgmr.fingerprint import key

_STATE, _ABOUT = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8})")
_KEPT = 2
log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A verified one."""

    step: int
    """Steps done."""
    file: Path
    about: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What was saved, one tensor at a time."""
        return weights.tensors(self.file, weights.layout(self.file))


def save(
    folder: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    about: dict[str, Any],
    group: Processes,
) -> None:
    """Write the checkpoint after ``step`` steps, verify it, and remove all but the two newest.

    All processes call it; the first one writes.

    Raises:
        DgmrError: what was written is not what is read back.
    """
    named = dict(sorted(tensors, key=itemgetter(0)))
    content = each_whole(named.items())
    if group.is_first:
        for leftover in folder.glob("step-*.*"):  # of a writer that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with replaced_folder(folder / f"step-{step:08d}") as partial:
            file = partial / _STATE
            written = weights.write(file, named, content)
            if sha256(file) != written:
                raise DgmrError(f"{file} does not read back as it was written: check the disk.")
            said = about | {"sha256": written}
            write_json(partial / _ABOUT, said | {"check": key(said)})
        for old in _folders(folder)[:-_KEPT]:
            shutil.rmtree(old)
    for _ in content:  # the other processes, which give their parts
        pass
    wait_for_all(group)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``folder``, or None where there is none; damaged ones are passed by."""
    for found in reversed(_folders(folder)):
        try:
            about = read_json(found / _ABOUT)
            is_whole = about.pop("check") == key(about)
            if is_whole and sha256(found / _STATE) == about.pop("sha256"):
                return Checkpoint(int(found.name[-8:]), found / _STATE, about)
        except (OSError, ValueError, LookupError, AttributeError):
            pass
        log.warning("%s is damaged; the checkpoint before it is taken.", found)
    return None


def keep_last(folder: Path) -> None:
    """Remove all but the newest, when the stage is done: it lets the same stage end at once."""
    for old in _folders(folder)[:-1]:
        shutil.rmtree(old)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
