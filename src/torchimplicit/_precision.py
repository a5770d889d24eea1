"""Reduced precision: how coarse and how narrow the numbers are that a function computes with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

COARSE = 1e-5
"""Rounding units above this are those of float16 and bfloat16: too few digits to give any of them away.

In single precision a tolerance of `ε^(2/3)` is 2e-5 and leaves a margin of 200 units; in bfloat16 it would be 4 %, of
which a gradient makes 20 %. Iterations in these dtypes come down to a third of a unit as a rule, and to a few in small
systems.
"""


class Watch(TorchFunctionMode):
    """Notes the coarsest of the dtypes that the operations in a block return.

    What autocast does to a function cannot be told from the dtype it returns: a layer norm after a product in bfloat16
    returns float32, with bfloat16's rounding in it.

    Attributes:
        epsilon: the largest rounding unit seen; 0 if there was none.
        narrow: whether float16 was among them, whose range a gradient easily leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epsilon = 0.0
        self.narrow = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize < 4:
                self.epsilon = max(self.epsilon, torch.finfo(leaf.dtype).eps)
                self.narrow = self.narrow or leaf.dtype == torch.float16
        return out


def unit_size(v: Tensor) -> Tensor:
    """A power of two for each row of `(B, n)`, `(B, 1)`, that brings its largest entry near 1; 1 where that cannot be.

    A product in float16 of a gradient under a scaled loss, or of a very small one, would leave float16's range; divided
    by this it does not, and nothing is rounded by the division.
    """
    size = torch.linalg.vector_norm(v, ord=torch.inf, dim=1, keepdim=True) if v.shape[1] else v.new_zeros(len(v), 1)
    usable = size.isfinite() & (size > 0)
    exponent = torch.where(usable, torch.frexp(size).exponent, 0)
    return torch.ldexp(torch.ones_like(size), exponent.clamp(-120, 120))


def overflowed(v: Tensor, u: Tensor) -> Tensor:
    """The rows, `(B,)` bool, whose gradient has left the range of float16 on its way in, `v`, or out, `u`."""
    return ~v.isfinite().all(dim=1) | (u.abs() > torch.finfo(torch.float16).max).any(dim=1)
