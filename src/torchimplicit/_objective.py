"""What `minimize` and `least_squares` solve: the gradient of an objective, as a function like any other."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._layout import Layout
from ._solution import PyTree


class Gradient:
    """`z ↦ ∂φ/∂z`, with the objective `φ` of each sample: `fn` itself, or `½‖fn‖²` where fn gives residuals.

    Differentiable where grad mode is on, so that Hessians and mixed derivatives come from it by automatic
    differentiation. For a complex z it is torch's gradient, `∂φ/∂(Re z) + i ∂φ/∂(Im z)`.

    Attributes:
        fn: the user's function.
        squares: whether fn gives residuals, of any shape after the batch dims.
        objective: `(B,)`, φ at the latest z; without a graph.
        residuals: `(B, m)`, real, fn at the latest z; None unless `squares`.
        samplewise: what fn says of itself (see `Problem.crowd`).
    """

    def __init__(self, kind: str, fn: Callable[..., PyTree], layout: Layout, squares: bool) -> None:
        self._kind = kind
        self._layout = layout
        self.fn = fn
        self.squares = squares
        self.samplewise = getattr(fn, "samplewise", None)
        self.objective: Tensor | None = None
        self.residuals: Tensor | None = None

    def part(self, layout: Layout) -> "Gradient":
        """The same for some of the samples."""
        return Gradient(self._kind, self.fn, layout, self.squares)

    def __call__(self, z: PyTree, *args: Any) -> PyTree:
        """The gradient at z, in the structure of z.

        Raises:
            TypeError: fn returns something else than real numbers.
            ValueError: it returns another shape than one number, or one row of residuals, per sample.
        """
        recording = torch.is_grad_enabled()
        leaves, spec = pytree.tree_flatten(z)
        with torch.inference_mode(False), torch.enable_grad():
            if not recording:
                leaves = [_leaf(t) for t in leaves]
            objective = self._evaluate(pytree.tree_unflatten(leaves, spec), args)
            self.objective = objective.detach().to(self._layout.dtype)
            if objective.requires_grad:
                gradients = torch.autograd.grad(objective.sum(), leaves, create_graph=recording, materialize_grads=True)
            else:
                gradients = [torch.zeros_like(t) for t in leaves]
        return pytree.tree_unflatten(list(gradients), spec)

    def rows(self, z: PyTree, *args: Any) -> Tensor:
        """The residuals at z, `(B, m)`, differentiable where grad mode is on."""
        return self.rows_of(self.fn(z, *args))

    def rows_of(self, out: PyTree) -> Tensor:
        """The residuals `(B, m)` in what fn returned."""
        return torch.cat([self._row(leaf) for leaf in pytree.tree_leaves(out)], dim=1)

    def _evaluate(self, z: PyTree, args: tuple[Any, ...]) -> Tensor:
        if self.squares:
            rows = self.rows(z, *args)
            self.residuals = rows.detach()
            return 0.5 * rows.square().sum(dim=1)
        return self.objective_of(self.fn(z, *args))

    def objective_of(self, value: Any) -> Tensor:
        """The objective `(B,)` in what fn returned.

        Raises:
            TypeError: that is no real number.
            ValueError: it has another shape than one number per sample.
        """
        batch = self._layout.batch_shape
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self._kind}: fn must return real numbers, one per sample, but it returned {found}.")
        if value.shape != batch:
            raise ValueError(
                f"{self._kind}: fn must return one number per sample, shape {tuple(batch)}, but it returned "
                f"{tuple(value.shape)}; sum over the dims after the first batch_dims={len(batch)}."
            )
        return value.reshape(-1)

    def _row(self, leaf: Any) -> Tensor:
        batch = self._layout.batch_shape
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            found = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{self._kind}: fn must return tensors of residuals, but it returned {found}.")
        if leaf.shape[: len(batch)] != batch:
            raise ValueError(
                f"{self._kind}: the residuals must have the batch shape {tuple(batch)} in front, but fn returned "
                f"{tuple(leaf.shape)}."
            )
        real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        # Counted, not -1, which an empty batch leaves open.
        return real.reshape(self._layout.matrix_shape[0], prod(real.shape[len(batch) :])).to(self._layout.dtype)


def _leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_() if t.is_inference() else t.detach().requires_grad_()
