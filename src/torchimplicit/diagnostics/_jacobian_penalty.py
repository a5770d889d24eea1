"""`jacobian_penalty`: an unbiased estimate of the Jacobian's size at a solution, to be added to a loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._layout import Layout
from .._solution import PyTree
from ._map import map_of


def jacobian_penalty(
    layer: nn.Module | Callable[..., PyTree],
    z: PyTree,
    *inputs: Any,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`‖J‖²_F` per unknown, `J = ∂f/∂z` at z, estimated without bias from `vᵀJ` (Bai, Koltun & Kolter 2021, eq. 5).

    >>> import torch, torchimplicit as ti
    >>> layer, x = ti.nn.TanhEquilibrium(8), torch.randn(32, 8)
    >>> z = layer(x)
    >>> loss = z.square().mean() + 0.5 * ti.jacobian_penalty(layer, z, x)
    >>> loss.backward()

    A small Jacobian makes the equilibrium quick to solve, forward and backward; nothing in training keeps it small by
    itself. One probe costs an evaluation of the cell and one product `vᵀJ`, and about as much again in the backward
    pass. The derivative is that of the estimate, exactly, in everything that the cell reads; and in z if z carries a
    graph: then it is that of the size at the moving solution, and the adjoint solve of the layer, which takes place in
    any case, serves both. The paper holds the solution fixed, which is what `z.detach()` asks for.

    The entries of v are ±1, which has less variance than the paper's normal ones (Hutchinson 1990): with one probe
    none at all where `J Jᵀ` is diagonal.

    Args:
        layer: a fixed-point layer of `torchimplicit.nn`, or a function `f(z, *inputs)`. It is called once: dropout
            draws masks of its own, BatchNorm in training sees one more batch.
        z: the solution: a tensor or pytree of any shape. A complex entry counts as two real unknowns.
        inputs: the layer's.
        probes: vectors v that are averaged over.
        generator: of the random numbers, on the device of z; None is torch's own.

    Returns:
        A scalar: the mean over all unknowns of the batch of the squared norms of the rows of J.

    Raises:
        TypeError: a layer that is no fixed-point layer; `f` returns another structure or dtype.
        ValueError: `probes` below 1; `f` returns another shape.
    """
    fn = map_of("jacobian_penalty", layer)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"jacobian_penalty: probes={probes!r} is not valid; give an integer >= 1.")
    layout = Layout.of(z, 0)
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        state = layout.pack([leaf.clone() if leaf.is_inference() else leaf for leaf in pytree.tree_leaves(z)])
        if not state.requires_grad:
            state = state.detach().requires_grad_()
        out = fn(layout.unpack(state), *inputs)
        value = layout.pack(layout.check_output(out, "jacobian_penalty"))
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for _ in range(probes if value.requires_grad else 0):
            v = torch.randint(0, 2, value.shape, generator=generator, device=value.device).to(value.dtype) * 2 - 1
            (product,) = torch.autograd.grad(
                value, state, v, create_graph=wanted, retain_graph=True, materialize_grads=True
            )
            total = total + product.square().sum()
    return total / (probes * max(state.numel(), 1))
