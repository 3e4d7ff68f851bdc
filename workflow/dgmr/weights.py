"""Weights on disk, one tensor at a time: writing never needs more memory than the largest."""

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor

from dgmr import checkpoint
from dgmr.errors import DgmrError
from dgmr.files import ORIGIN

# As the README of safetensors has them, section Format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Under which a training script keeps the weights, the wanted ones first; timm looks there too.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read(path: Path) -> dict[str, Any]:
    """The state dict of a checkpoint: any that :func:`dgmr.checkpoint.weights_files` knows.

    Its tensors are mapped, not read: their bytes come when they are used, and may leave memory
    again. (Not so those of ``torch.save`` before version 1.6.) Names and nesting are the file's own,
    but for what training scripts wrap around them. No code in a file is run.

    Raises:
        DgmrError: a file is missing, damaged or half written, or could only be read by running code.
    """
    found: dict[str, Any] = {}
    for file in checkpoint.weights_files(path):
        if file.suffix == ".safetensors":
            found |= _mapped(file)
        elif file.suffix != ".json":
            found |= _unpickled(file)
    return clean_state_dict(found)


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise DgmrError(
            f"{path} is no whole safetensors file ({error}): copy or download it again."
        ) from None


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        # timm's own checkpoints have their script's options, which are harmless, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files from before the zip format cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # torch raises all sorts of errors for damaged files.
        if code := re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error)):
            raise DgmrError(
                f"{path} is refused, for reading it would run code ({code[1] or code[2]}): save its"
                " state dict alone, best as safetensors."
            ) from None
        raise DgmrError(
            f"{path} is no whole file of torch.save ({type(error).__name__}): copy or download it"
            " again."
        ) from None
    if isinstance(found, dict):
        found = next((found[key] for key in _WRAPPERS if found.get(key) is not None), found)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise DgmrError(f"{path} holds no state dict (tensors by name): save model.state_dict().")
    return found


def layout(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the meta device: dtypes and shapes alone."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        return {
            name: torch.empty(found.get_shape(), dtype=dtypes[found.get_dtype()], device="meta")
            for name, found in slices.items()
        }


def tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a safetensors file, read one after the other; no other is read."""
    for name in names:
        # Opened for each: what was read of an open file stays in memory.
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


def origin(path: Path) -> dict[str, Any] | None:
    """What a safetensors file says it was made of, or None where there is no readable file that says."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()[ORIGIN])
            return found
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None


def write(
    path: Path,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    origin: dict[str, Any] | None = None,
) -> str:
    """Write a safetensors file of ``tensors`` as they come, not atomically; SHA-256 of what was written.

    Args:
        path: the file.
        layout: tensors of the same names, dtypes and shapes, on any device, the meta device too.
        tensors: names and tensors, in the order of ``layout``.
        origin: what the file is made of; timm's mark of a file for PyTorch where not given.

    Raises:
        ValueError: a tensor is not the one that the layout says.
    """
    expected = iter(layout.items())
    metadata = {"format": "pt"} if origin is None else {ORIGIN: json.dumps(origin)}
    digest = hashlib.sha256(header := _header(layout, metadata))
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            wanted_name, wanted = next(expected, ("no further tensor", tensor))
            if (name, tensor.shape, tensor.dtype) != (wanted_name, wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{path}: {name} {list(tensor.shape)} {tensor.dtype} comes where"
                    f" {wanted_name} {list(wanted.shape)} {wanted.dtype} belongs"
                )
            digest.update(raw := _raw(tensor))
            file.write(raw)
        if missing := next(expected, None):
            raise ValueError(f"{path}: {missing[0]} did not come")
    return digest.hexdigest()


class Rows:
    """A safetensors file of tensors whose rows come piece by piece; not atomic.

    It is whole once all rows were added and it was closed.
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """``layout``: names, dtypes and shapes of the whole tensors; on any device."""
        header = _header(layout, metadata)
        self._file = path.open("wb")
        self._file.write(header)
        self._layout = layout
        self._next, self._end = {}, {}
        start = len(header)
        for name, tensor in layout.items():
            self._next[name] = start
            self._end[name] = start = start + tensor.numel() * tensor.element_size()

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows to every tensor, in its dtype."""
        for name, tensor in self._layout.items():
            raw = _raw(rows[name].to(tensor.dtype))
            self._file.seek(self._next[name])
            self._file.write(raw)
            self._next[name] += len(raw)

    def close(self) -> None:
        """No more rows come.

        Raises:
            ValueError: there were more or fewer than the layout says.
        """
        self._file.close()
        if self._next != self._end:
            raise ValueError(f"{self._file.name}: {self._next} bytes came where {self._end} belong")


class Spans(NamedTuple):
    """Where the rows of a safetensors file's tensor lie."""

    rows: int
    dtype: torch.dtype
    row: list[int]
    """Shape of a row."""
    row_bytes: int
    offset: int
    """Of the first row, from the file's beginning."""


def spans(path: Path) -> dict[str, Spans]:
    """Where every tensor's rows lie, for readers of single rows; see README of safetensors, Format."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        count, *row = about["shape"]
        row_bytes = (end - start) // max(count, 1)
        found[name] = Spans(count, dtypes[about["dtype"]], row, row_bytes, 8 + length + start)
    return found


def _header(layout: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
