"""Digits by the batch, and how to move or distort them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.experiments.data import Digits, Split


def batches(
    split: Split, size: int, generator: torch.Generator | None = None, odd: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `(B, 1, 28, 28)` in [0, 1] and labels `(B,)`.

    With a generator they come in random order, and the odd rest is left out unless `odd`.
    """
    if generator is None:
        order = torch.arange(len(split))
    else:
        order = torch.randperm(len(split), generator=generator)
        order = order if odd else order[: len(split) // size * size]
    for rows in order.split(size):
        images, labels = split.batch(rows)
        yield images[:, None], labels


def shift(images: Tensor, by: int) -> Tensor:
    """Each image of `(B, 1, H, W)` moved by a random number of pixels, −by to by, in each direction."""
    padded = functional.pad(images[:, 0], (by, by, by, by))
    batch, height, width = images[:, 0].shape
    rows = torch.arange(height) + torch.randint(0, 2 * by + 1, (batch, 1))
    columns = torch.arange(width) + torch.randint(0, 2 * by + 1, (batch, 1))
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def distort(
    images: Tensor, generator: torch.Generator, turn: float = 0.15, grow: float = 0.1, move: float = 2.0
) -> Tensor:
    """Each image turned (radians), scaled and moved (pixels) at random, up to so much."""
    batch, size = images.shape[0], images.shape[-1]
    draw = 2 * torch.rand(batch, 4, generator=generator) - 1
    angle, scale = turn * draw[:, 0], 1 + grow * draw[:, 1]
    cosine, sine, moved = scale * angle.cos(), scale * angle.sin(), 2 * move / size * draw[:, 2:]
    rows = [torch.stack([cosine, -sine, moved[:, 0]], 1), torch.stack([sine, cosine, moved[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def sizes(data: Digits) -> str:
    """How many images to train with and to test with, for the record."""
    return f"{len(data.train)} + {len(data.test)}"
