"""The IDX reader: what it accepts, and what it says about what it does not."""

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.idx import read_idx, write_idx


@pytest.fixture
def images() -> Tensor:
    return torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_round_trip(tmp_path: Path, images: Tensor, name: str) -> None:
    write_idx(tmp_path / name, images)
    assert torch.equal(read_idx(tmp_path / name, 3), images)


def test_reads_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 255]))
    assert read_idx(path, 1).tolist() == [7, 0, 255]


def test_gzip_is_recognised_by_content_not_by_name(tmp_path: Path, images: Tensor) -> None:
    write_idx(tmp_path / "a.gz", images)
    (tmp_path / "a").write_bytes((tmp_path / "a.gz").read_bytes())
    assert torch.equal(read_idx(tmp_path / "a", 3), images)


GOOD = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 255])
DAMAGED = {
    "elements missing": (GOOD[:-1], "truncated, its header [3] promises 11 bytes, found 10"),
    "elements left over": (GOOD + b"\0", "too long, its header [3] promises 11 bytes, found 12"),
    "header cut": (GOOD[:6], "truncated, expected at least 8 bytes, found 6"),
    "empty file": (b"", "truncated, expected at least 8 bytes, found 0"),
    "not IDX": (b"PK\3\4" + GOOD, "expected it to begin with 00000801, found 504b0304"),
    "floats": (bytes([0, 0, 0x0D, 1]) + GOOD[4:], "expected it to begin with 00000801, found 00000d01"),
    "two dimensions": (bytes([0, 0, 8, 2]) + GOOD[4:], "expected it to begin with 00000801, found 00000802"),
    "no elements": (bytes([0, 0, 8, 1, 0, 0, 0, 0]), "empty"),
    "gzip cut": (gzip.compress(GOOD)[:-6], "cannot be read"),
    "gzip damaged": (gzip.compress(GOOD)[:12] + b"\xff\xff\xff" + gzip.compress(GOOD)[15:], "cannot be read"),
}


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ExperimentError) as caught:
        read_idx(path, 1)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    assert path.read_bytes() == content
