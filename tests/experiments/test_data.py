"""The three sources of digits, and the fixed split of the embedded ones."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch

from torchimplicit.experiments import data
from torchimplicit.experiments.data import Digits, embedded_split, load_digits, load_folder
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.idx import write_idx


@pytest.fixture(autouse=True)
def _no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)


def test_embedded_split_is_stratified(embedded: Digits) -> None:
    assert torch.bincount(embedded.train.labels).tolist() == [400] * 10
    assert torch.bincount(embedded.test.labels).tolist() == [100] * 10


def test_embedded_split_is_fixed() -> None:
    train, test = embedded_split(torch.arange(10).repeat_interleave(500))
    assert test[:3].tolist() == [4, 9, 14]
    joined = ",".join(map(str, train.tolist() + test.tolist())).encode()
    assert hashlib.sha256(joined).hexdigest()[:16] == "a43afdcb0ddb174c"


def test_embedded_digits_are_the_known_ones(embedded: Digits) -> None:
    assert embedded.checksum()[:16] == "116356584b3a172c"


def test_a_batch_is_scaled_to_the_unit_interval(embedded: Digits) -> None:
    images, labels = embedded.train.batch(torch.tensor([5, 3]))
    assert images.shape == (2, 28, 28)
    assert images.dtype == torch.float32
    assert torch.equal(images[0], embedded.train.images[5].float() / 255)
    assert labels.tolist() == embedded.train.labels[[5, 3]].tolist()


def test_folder_named_by_the_environment(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(small_data))
    digits = load_digits()
    assert (len(digits.train), len(digits.test)) == (240, 60)
    assert digits.source == f"IDX files in {small_data}"


def test_missing_file_is_named(small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path, dirs_exist_ok=True)
    (tmp_path / data.IMAGES["test"]).unlink()
    with pytest.raises(ExperimentError, match="lacks t10k-images-idx3-ubyte"):
        load_folder(tmp_path)


def test_images_and_labels_must_belong_together(small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path, dirs_exist_ok=True)
    write_idx(tmp_path / f"{data.LABELS['train']}.gz", torch.zeros(7, dtype=torch.uint8))
    with pytest.raises(ExperimentError, match="holds 7 labels, but train-images-idx3-ubyte holds 240 images"):
        load_folder(tmp_path)


def test_labels_beyond_nine_are_refused(small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path, dirs_exist_ok=True)
    write_idx(tmp_path / f"{data.LABELS['test']}.gz", torch.full((60,), 12, dtype=torch.uint8))
    with pytest.raises(ExperimentError, match="labels must be 0 to 9, found 12"):
        load_folder(tmp_path)


# OpenML itself cannot be reached from a test: what scikit-learn would return stands in for it.
def test_download_is_cached_as_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(*arguments: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(arguments)
        pixels = np.zeros((70_000, 784))
        pixels[59_999, 0], pixels[60_000, 0] = 255.0, 3.0
        return pixels, (np.arange(70_000) % 10).astype(str).astype(object)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    monkeypatch.setattr(data, "cache_dir", lambda: tmp_path / "cache")
    for _ in range(2):
        digits = load_digits(download=True)
        assert (len(digits.train), len(digits.test)) == (60_000, 10_000)
        assert digits.train.images[-1, 0, 0] == 255
        assert digits.test.images[0, 0, 0] == 3
        assert digits.test.labels[:3].tolist() == [0, 1, 2]
    assert calls == [("mnist_784",)]


def test_failed_download_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: object, **options: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(ExperimentError, match=r"OpenML could not be read \(no route\)"):
        load_digits(tmp_path / "new", download=True)
    assert not (tmp_path / "new").exists()
