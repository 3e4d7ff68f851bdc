"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): the photographs behind the default run.

The four official files are looked for in order: where Debian's ``dataset-fashion-mnist`` installs
them, at their official addresses (through torchvision, checksums verified), and inside the Debian
package, fetched and unpacked without installing it.
"""

import gzip
import hashlib
import shutil
import socket
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dgmr.errors import DgmrError

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = 0.2860, 0.3530
_PREFIX = {"train": "train", "test": "t10k"}
# Of the unpacked files: Debian compresses them anew, so the .gz files' own sums differ.
_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_NETWORK_TIMEOUT_S = 30


def load(
    split: Literal["train", "test"], download_folder: Path
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[n, 28, 28]`` (0 black to 255 white) and labels ``[n]`` of a split.

    Raises:
        DgmrError: the files are in none of the three places.
    """
    folder = locate(download_folder)
    images = _unpacked(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz")
    labels = _unpacked(folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz")
    # The idx format's headers: 16 bytes for three dimensions, 8 for one.
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def locate(download_folder: Path) -> Path:
    """The folder that holds the four verified files; downloads them to ``download_folder`` if need be.

    Raises:
        DgmrError: the files are in none of the three places.
    """
    if _is_complete(DEBIAN_FOLDER):
        return DEBIAN_FOLDER
    failures = []
    for obtain in (_keep, _from_official_addresses, _from_debian_package):
        try:
            download_folder.mkdir(parents=True, exist_ok=True)
            with FileLock(download_folder / ".lock"):  # two jobs may want it at once
                obtain(download_folder)
                if _is_complete(download_folder):
                    return download_folder
            failures += [] if obtain is _keep else ["what came is not the four official files"]
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(str(error))
    raise DgmrError(
        f"Fashion-MNIST is not in {DEBIAN_FOLDER} and could not be fetched ({'; '.join(failures)}):"
        f" install the Debian package {DEBIAN_PACKAGE} or put the four official .gz files"
        f" into {download_folder}."
    )


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def _is_complete(folder: Path) -> bool:
    try:
        return all(
            hashlib.sha256(_unpacked(folder / name)).hexdigest() == expected
            for name, expected in _SHA256.items()
        )
    except (OSError, EOFError, zlib.error):  # not there, cut off, or no gzip
        return False


def _keep(folder: Path) -> None:
    """What an earlier run left in the folder may be complete already."""


def _from_official_addresses(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT_S)
    try:
        for name, md5 in FashionMNIST.resources:
            download_url(FashionMNIST.mirrors[0] + name, str(folder), name, md5)
    finally:
        socket.setdefaulttimeout(previous)


def _from_debian_package(folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError("no apt-get here")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # A state folder of our own: works on machines whose package lists were never fetched,
        # and without root.
        state = Path(scratch, "state")
        (state / "lists" / "partial").mkdir(parents=True)
        (state / "cache" / "archives" / "partial").mkdir(parents=True)
        options = [
            f"-oDir::State::Lists={state}/lists",
            f"-oDir::Cache={state}/cache",
            "-oAPT::Sandbox::User=",
        ]
        for command in (["update"], ["download", DEBIAN_PACKAGE]):
            subprocess.run(
                ["apt-get", "-qq", *options, *command],
                cwd=scratch,
                check=True,
                capture_output=True,
                timeout=300,
            )
        (package,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True, timeout=60)
        for name in _SHA256:
            shutil.move(Path(scratch) / DEBIAN_FOLDER.relative_to("/") / name, folder / name)
