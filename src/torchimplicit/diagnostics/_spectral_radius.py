"""`spectral_radius`: how fast plain iteration contracts at a solution, sample by sample and without the matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._layout import Layout
from .._problem import Problem
from .._solution import PyTree
from ._arnoldi import dominant_eigenvalue
from ._map import is_implicit, map_of
from ._subject import untouched


@dataclass(frozen=True)
class SpectralRadius:
    """What `spectral_radius` found. Per-sample fields have the batch shape.

    Attributes:
        value: `ρ(J)`, the modulus of the eigenvalue; NaN where the Jacobian is not finite.
        eigenvalue: the eigenvalue of the largest modulus, complex; of a pair the one above the real axis.
        converged: whether it is an eigenvalue to the tolerance. Where not, `value` is the best estimate.
        residual: `‖Jᵀy − θ y‖ / |θ|` of its vector y of norm 1: θ is exactly an eigenvalue of a matrix that differs
            from J by that much, relative to θ.
        products: Jacobian products taken, each of the whole batch.
    """

    value: Tensor
    eigenvalue: Tensor
    converged: Tensor
    residual: Tensor
    products: int


def spectral_radius(
    layer: nn.Module | Callable[..., PyTree],
    z: PyTree,
    *inputs: Any,
    batch_dims: int | None = None,
    rtol: float = 1e-3,
    basis: int = 60,
    max_products: int = 500,
) -> SpectralRadius:
    """The spectral radius of `J = ∂f/∂z` at z, of each sample.

    >>> import torch, torchimplicit as ti
    >>> layer, x = ti.nn.TanhEquilibrium(50), torch.zeros(4, 50)
    >>> found = ti.spectral_radius(layer, layer(x), x)  # at z = 0 the Jacobian is W
    >>> bool(found.converged.all()), found.value.shape
    (True, torch.Size([4]))
    >>> exact = torch.linalg.eigvals(layer.linear.weight).abs().max()
    >>> bool(((found.value - exact).abs() < 0.01 * exact).all())
    True

    Below 1 plain iteration converges near z, and gains `−log₁₀ ρ` digits per step; at 1 or above it does not. By
    Arnoldi's method, from products `Jᵀp` alone. Power iteration, the usual choice, never settles where the largest
    eigenvalues are a complex pair, as they are for anything like a rotation; a subspace holds the pair.

    What has converged is an eigenvalue to `rtol`, in the sense of `residual`; where J is far from normal, less than
    that is certain about the number itself. That none is larger is as certain as with any method that sees products
    only: the start is random (the same at each call), and a larger one would have to be all but absent from it. With up
    to `basis` unknowns the subspace is everything, and nothing can be missed.

    Args:
        layer: a fixed-point layer of `torchimplicit.nn`, or a function `f(z, *inputs)`.
        z: the solution: a tensor or pytree of any shape.
        inputs: the layer's.
        batch_dims: the first dims of z that index independent problems; None is the layer's own, and 0 for a function.
        rtol: see `residual`.
        basis: vectors of the size of z that are kept, twice.
        max_products: a sample that has not converged by then is reported so.

    Returns:
        A `SpectralRadius`. It has no gradient; `jacobian_penalty` has. Buffers and random numbers stay as they were.

    Raises:
        TypeError: a layer that is no fixed-point layer; `f` returns another structure or dtype.
        ValueError: an option out of range; `f` returns another shape.
    """
    fn = map_of("spectral_radius", layer)
    _check(rtol, basis, max_products)
    owner: Any = layer
    dims = batch_dims if batch_dims is not None else owner._batch_dims(*inputs) if is_implicit(layer) else 0
    layout = Layout.of(z, dims)
    problem = Problem("fixed_point", fn, inputs, layout)
    with untouched(layer, (z, inputs)), torch.no_grad(), problem.exact():
        state = layout.pack([leaf.detach() for leaf in pytree.tree_leaves(z)])
        value = problem.output(state)
        jacobian = problem.linearize(state, value).jacobian
        random = torch.Generator().manual_seed(0)
        # The same for each sample: what is found of it does not depend on its place.
        start = torch.randn(state.shape[1], generator=random, dtype=torch.float64).to(state).expand(state.shape)
        before = problem.evaluations
        first = jacobian.rmv(start.contiguous())
        finite = first.isfinite().all(dim=1)

        def multiply(p: Tensor) -> Tensor:
            return torch.where(finite[:, None], jacobian.rmv(p), 0.0)

        found = dominant_eigenvalue(multiply, start, rtol, basis, max_products)
    modulus = found.value.abs()
    relative = found.residual / torch.where(modulus > 0, modulus, 1.0)
    return SpectralRadius(
        value=layout.per_sample(torch.where(finite, modulus, torch.nan)),
        eigenvalue=layout.per_sample(torch.complex(found.value.real, found.value.imag.abs())),
        converged=layout.per_sample(found.converged & finite),
        residual=layout.per_sample(torch.where(finite, relative, torch.inf)),
        products=problem.evaluations - before,
    )


def _check(rtol: Any, basis: Any, max_products: Any) -> None:
    for name, value, low in (("basis", basis, 4), ("max_products", max_products, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"spectral_radius: {name}={value!r} is not valid; give an integer >= {low}.")
    number = isinstance(rtol, int | float) and not isinstance(rtol, bool)
    if not number or not 0 < rtol < 1 or not math.isfinite(rtol):
        raise ValueError(f"spectral_radius: rtol={rtol!r} is not valid; give a number between 0 and 1.")
