"""Tables of image URLs in LAION's columns, whose names differ in case and spelling by release."""

import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dgmr.errors import DgmrError
from dgmr.params import Filters

# Our name of a column, and what releases call it, in lower case.
SPELLINGS = {
    "url": ("url",),
    "caption": ("text", "caption", "alt_text"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity", "clip_similarity"),
    "punsafe": ("punsafe",),
    "nsfw": ("nsfw",),
}


def find(pattern: str, key: str = "data.table") -> list[Path]:
    """The files that the path or glob given as ``key`` names, sorted.

    Raises:
        DgmrError: there is none.
    """
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise DgmrError(f"{key}: no file matches {pattern}.")
    return paths


def columns(path: Path, filters: Filters) -> dict[str, str]:
    """The table's own column for each of ours that it has.

    Raises:
        DgmrError: the file is no Parquet, or lacks a column that is needed.
    """
    try:
        present = {name.lower(): name for name in pq.read_schema(path).names}
    except (OSError, pa.ArrowInvalid) as error:
        raise DgmrError(f"data.table: {path} cannot be read as Parquet: {error}") from None
    found = {
        ours: present[theirs]
        for ours, spellings in SPELLINGS.items()
        for theirs in reversed(spellings)
        if theirs in present
    }
    for ours, reason in _needed(filters).items():
        if not any(name in found for name in ours.split(" or ")):
            raise DgmrError(
                f"data.table: {path} has no column {ours} (needed {reason});"
                f" it has {', '.join(present.values())}."
            )
    return found


def _needed(filters: Filters) -> dict[str, str]:
    needed = {"url": "to find the images"}
    if filters.min_side is not None or filters.max_aspect_ratio is not None:
        reason = "by data.filters.min_side and max_aspect_ratio"
        needed |= {"width": reason, "height": reason}
    if filters.min_similarity is not None:
        needed["similarity"] = "by data.filters.min_similarity"
    if filters.max_punsafe is not None:
        needed["punsafe or nsfw"] = "by data.filters.max_punsafe; null keeps unjudged images"
    return needed
