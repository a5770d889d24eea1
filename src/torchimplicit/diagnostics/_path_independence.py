"""`path_independence`: whether a layer finds the same solution wherever it begins."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._layout import Layout
from ._map import is_implicit
from ._subject import exchanged, untouched


@dataclass(frozen=True)
class PathIndependence:
    """What `path_independence` found. Per-sample fields have the batch shape.

    Attributes:
        cosine: of the two solutions; 1 where both are zero, 0 where one is.
        distance: between the two, relative to the larger one: what a cosine does not see.
        converged: whether both solves converged. Of a sample that ran out of steps the two differ by that, too.
    """

    cosine: Tensor
    distance: Tensor
    converged: Tensor

    @property
    def score(self) -> float:
        """The mean cosine: the asymptotic alignment score of the paper."""
        return float(self.cosine.mean())


def path_independence(layer: nn.Module, *inputs: Any) -> PathIndependence:
    """Solve from the layer's own start, and again from the solution of another sample, and compare the two.

    (Anil et al. 2022, "Path Independent Equilibrium Models Can Better Exploit Test-Time Computation": models whose
    asymptotic alignment score is near 1 go on to improve with more iterations on harder samples than they were trained
    on. `nn.RandomStart` makes them so.) Buffers, memories and random numbers stay as they were.

    >>> import torch, torchimplicit as ti
    >>> bistable = ti.nn.FixedPoint(lambda z, x: torch.tanh(3 * z) + 0 * x, init=lambda x: x, solver=ti.Picard())
    >>> ti.path_independence(bistable, torch.tensor([[1.0], [-1.0]])).cosine
    tensor([-1., -1.])

    Args:
        layer: an implicit layer of `torchimplicit.nn`.
        inputs: the layer's, for a batch of at least two samples. What is compared with depends on their order: each
            sample begins at the solution of the one before it.

    Raises:
        TypeError: something else than an implicit layer.
        ValueError: fewer than two samples.
    """
    if not is_implicit(layer):
        raise TypeError(f"path_independence: layer must be an implicit layer, but is {type(layer).__name__}.")
    solver: Any = layer
    with exchanged([(layer, "on_failure", "ignore")]), untouched(layer, inputs), torch.no_grad():
        first = solver.solve(*inputs, start=solver._start(*inputs))  # past a memory, which is not to see this
        layout = Layout.of(first.value, first.status.ndim)
        one = layout.pack(pytree.tree_leaves(first.value))
        if len(one) < 2:
            raise ValueError(
                f"path_independence: a batch of {len(one)} has no other sample to begin at; give two or more."
            )
        second = solver.solve(*inputs, start=layout.unpack(one.roll(1, 0)))
        other = layout.pack(pytree.tree_leaves(second.value))
    one, other = one.double(), other.double()
    a, b = torch.linalg.vector_norm(one, dim=1), torch.linalg.vector_norm(other, dim=1)
    zero = a * b == 0
    cosine = (one * other).sum(1) / torch.where(zero, 1.0, a * b)
    cosine = torch.where(zero, (a == b).double(), cosine).clamp(-1.0, 1.0)
    larger = torch.maximum(a, b)
    distance = torch.linalg.vector_norm(one - other, dim=1) / torch.where(larger > 0, larger, 1.0)
    return PathIndependence(
        cosine=layout.per_sample(cosine).to(layout.dtype),
        distance=layout.per_sample(distance).to(layout.dtype),
        converged=first.converged & second.converged,
    )
