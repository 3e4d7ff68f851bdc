"""Fashion-MNIST's train images as files, with a table in LAION's columns.

So the demo's data takes the same way through the room as a LAION subset.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dgmr import fashion_mnist
from dgmr.files import replaced_files


def make(table: Path, download_folder: Path) -> None:
    """Write ``table`` (Parquet), and beside it ``images/<row>.png``, to which its URLs point.

    URLs are relative to the table, so that the same table comes out on every machine.
    ``similarity`` is null, for there is no CLIP score; ``punsafe`` is 0: they are clothes.
    """
    images, labels = fashion_mnist.load("train", download_folder)
    urls = [f"images/{row:05d}.png" for row in range(len(images))]
    count, height, width = images.shape
    columns = {
        "URL": urls,
        "TEXT": [f"a photo of: {fashion_mnist.CLASSES[label]}" for label in labels],
        "WIDTH": np.full(count, width),
        "HEIGHT": np.full(count, height),
        "similarity": pa.nulls(count, pa.float64()),
        "punsafe": np.zeros(count),
    }
    with replaced_files(table.parent, table.name) as folder:
        (folder / "images").mkdir()
        for url, image in zip(urls, images, strict=True):
            Image.fromarray(image).save(folder / url, compress_level=1)
        pq.write_table(pa.table(columns), folder / table.name)
