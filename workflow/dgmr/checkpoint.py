"""Which files a local teacher is read from; without torch, for Snakemake asks at parse time."""

import json
from pathlib import Path

from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.params import Teacher

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_FORMS = (
    f"weights in a folder are {WEIGHTS}, shards with their {_INDEX}, or {_PICKLE}; a local-dir has"
    f" its {CONFIG} too, as timm.models.save_for_hf writes it"
)


def teacher_files(teacher: Teacher) -> list[Path]:
    """The local files that say what the teacher is; none where timm fetches it. None is opened but an index.

    Raises:
        DgmrError: a file is missing, or is of an unknown kind.
    """
    found = []
    if teacher.folder is not None:
        config = teacher.folder / CONFIG
        if not config.is_file():
            raise DgmrError(f"teacher.model: {config} is missing; {_FORMS}.")
        found.append(config)
    if teacher.weights is not None:
        knob = "model" if teacher.checkpoint is None else "checkpoint"
        try:
            found += weights_files(teacher.weights)
        except DgmrError as error:
            raise DgmrError(f"teacher.{knob}: {error}") from None
    return found


def weights_files(path: Path) -> list[Path]:
    """The files of the checkpoint ``path``, a file or a folder; where there is an index, it goes first.

    Raises:
        DgmrError: a file is missing, or is of an unknown kind.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise DgmrError(f"{path} is missing.")
    if path.suffix not in _SUFFIXES:
        raise DgmrError(f"{path} must be a folder or end in {', '.join(_SUFFIXES)}.")
    return [path]


def _of_folder(folder: Path) -> list[Path]:
    for name in (WEIGHTS, _INDEX, _PICKLE):
        if (folder / name).is_file():
            break
    else:
        raise DgmrError(f"{folder / WEIGHTS} is missing; {_FORMS}.")
    if name != _INDEX:
        return [folder / name]
    index = folder / _INDEX
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        paths = [folder / shard for shard in shards]
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise DgmrError(
            f"{index} is no index of shards (a weight_map from tensors to files): copy it again."
        ) from None
    for shard in paths:
        if not shard.is_file():
            raise DgmrError(
                f"{shard} is missing, which {_INDEX} names: copy all {len(shards)} shards there."
            )
    return [index, *paths]
