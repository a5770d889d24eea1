"""`RandomStart`: in training a layer begins somewhere else each time, so that its solution does not depend on it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._solution import PyTree


class RandomStart(nn.Module):
    """A start for `init=`: random in training, the plain one in evaluation (Anil et al. 2022, "mixed initialisation").

    A layer that has only ever begun at one place may have several solutions, or none that other starts lead to. What
    it learns from random ones is *path independence*, which `path_independence` measures, and which goes with more
    iterations being of use at test time. Each sample begins at the plain start with probability `plain`, else at
    normal noise around it.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.TanhEquilibrium(8, init=ti.nn.RandomStart())
    >>> x = torch.randn(4, 8)
    >>> bool((layer.init(x) == 0).all()), bool((layer.eval().init(x) == 0).all())
    (False, True)

    Args:
        std: of the noise.
        plain: probability of the plain start.
        start: gives the plain start from the inputs; None is zeros like the first input.
        batch_dims: the first dims of the start that index samples.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        std: float = 1.0,
        plain: float = 0.5,
        start: Callable[..., PyTree] | None = None,
        batch_dims: int = 1,
    ) -> None:
        super().__init__()
        for name, value, high in (("std", std, float("inf")), ("plain", plain, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise ValueError(f"RandomStart: {name}={value!r} is not valid; give a number in [0, {high}].")
        if start is not None and not callable(start):
            raise TypeError(f"RandomStart: start={start!r} is not callable; give a function of the inputs, or None.")
        if isinstance(batch_dims, bool) or not isinstance(batch_dims, int) or batch_dims < 0:
            raise ValueError(f"RandomStart: batch_dims={batch_dims!r} is not valid; give an integer >= 0.")
        self.std, self.plain, self.start, self.batch_dims = std, plain, start, batch_dims

    def forward(self, *inputs: Any) -> PyTree:
        """The start for these inputs."""
        base = self._base(*inputs)
        if not self.training:
            return base
        first = pytree.tree_leaves(base)[0]
        batch = first.shape[: self.batch_dims]
        noisy = torch.rand(batch, device=first.device) >= self.plain
        return pytree.tree_map(lambda leaf: self._moved(leaf, noisy), base)

    def extra_repr(self) -> str:
        """The options."""
        return f"std={self.std}, plain={self.plain}, batch_dims={self.batch_dims}"

    def _base(self, *inputs: Any) -> PyTree:
        if self.start is not None:
            return self.start(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            what = type(inputs[0]).__name__ if inputs else "missing"
            raise TypeError(
                f"RandomStart starts around zeros like the first input, which must be a tensor but is {what}; give "
                "start=, a callable of the inputs."
            )
        return torch.zeros_like(inputs[0])

    def _moved(self, leaf: Tensor, noisy: Tensor) -> Tensor:
        noisy = noisy.reshape(*noisy.shape, *[1] * (leaf.ndim - noisy.ndim))
        return torch.where(noisy, leaf + self.std * torch.randn_like(leaf), leaf)
