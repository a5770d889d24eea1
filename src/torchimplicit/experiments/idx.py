"""Reader and writer of IDX files, the format MNIST is published in (unsigned bytes only), plain or gzip."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import write_atomically

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> Tensor:
    """Return the uint8 tensor of `dims` dimensions in `path`.

    Layout: two zero bytes, the element type, the number of dimensions, each size as four big-endian bytes,
    the elements. Raises `ExperimentError`, which names the file, unless every byte is accounted for.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"{path}: cannot be read ({error}); replace the file") from error
    header = 4 + 4 * dims
    if len(data) < header:
        raise ExperimentError(
            f"{path}: truncated, expected at least {header} bytes, found {len(data)}; replace the file"
        )
    magic = bytes([0, 0, UNSIGNED_BYTE, dims])
    if data[:4] != magic:
        raise ExperimentError(
            f"{path}: not an IDX file of unsigned bytes in {dims} dimension(s), "
            f"expected it to begin with {magic.hex()}, found {data[:4].hex()}"
        )
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ExperimentError(
            f"{path}: {what}, its header {shape} promises {expected} bytes, found {len(data)}; replace the file"
        )
    if math.prod(shape) == 0:
        raise ExperimentError(f"{path}: empty, its header promises {shape} elements; replace the file")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(shape)


def write_idx(path: Path, values: Tensor) -> None:
    """Write a uint8 tensor to `path` (gzip if it ends in `.gz`), all of it or nothing."""
    header = bytes([0, 0, UNSIGNED_BYTE, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    data = header + values.to(torch.uint8).contiguous().numpy().tobytes()
    # mtime=0: the same values give the same file.
    write_atomically(path, gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
