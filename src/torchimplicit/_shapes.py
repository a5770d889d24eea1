"""A call on the meta device: shapes, dtypes and what depends on what; there are no values to solve for."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ._layout import Layout
from ._solution import PyTree, Solution


def shapes_only(kind: str, fn: Callable[..., PyTree], z0: PyTree, args: tuple[Any, ...], layout: Layout) -> Solution:
    """A `Solution` whose tensors are on the meta device, from one call of fn.

    Its value is fn's, which has the state's structure, shapes and dtypes, and depends on all that fn reads. Nothing in
    it says that anything has converged: the tensors have no values.

    Args:
        kind: what is solved, for messages.
        fn: the map, the function whose zero is wanted, or the gradient of an objective.
        z0: the start.
        args: handed to fn.
        layout: of z0.

    Raises:
        TypeError, ValueError: fn returns another structure, dtype or shape than z0's.
    """
    leaves = layout.check_output(fn(pytree.tree_map(lambda leaf: leaf.detach(), z0), *args), kind)
    leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, layout.dtypes, strict=True)]
    integers = torch.empty(layout.batch_shape, dtype=torch.long, device="meta")
    return Solution(
        value=pytree.tree_unflatten(leaves, layout.spec),
        status=integers,
        converged=integers == 0,
        residual=integers.to(layout.dtype),
        steps=integers.clone(),
        evaluations=1,
    )
