"""`BySample`: each sample of a training set starts from the solution it had in the epoch before."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils import _pytree as pytree

from .._solution import PyTree, Solution, Status
from ..solvers import Method
from ._memory import Memory, choose, is_transformed


class BySample(Memory):
    """A memory for `init=` that is keyed by sample: of use in epochs over shuffled batches.

    The keys are the samples' numbers in the training set, as a loader can hand them out. Outside of `of` nothing is
    remembered and nothing used: an evaluation in between does no harm.

    >>> import torch, torchimplicit as ti
    >>> memory = ti.nn.BySample(1000)
    >>> layer, data = ti.nn.TanhEquilibrium(8, init=memory), torch.randn(1000, 8)
    >>> keys = torch.randperm(1000)[:32]
    >>> with memory.of(keys):
    ...     first = layer.solve(data[keys])
    >>> with memory.of(keys.flip(0)):
    ...     again = layer.solve(data[keys.flip(0)])
    >>> again.evaluations < first.evaluations
    True

    What is found does not depend on it, but for the tolerance and for equations with several solutions. A sample that
    failed begins anew. It takes as much memory as the solutions of all samples, on the device they are on, and is no
    part of the `state_dict`. The first dim of the state is that of the samples. One memory for each layer.

    Args:
        samples: how many there are; keys are from 0 to `samples − 1`.
    """

    def __init__(self, samples: int) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r} is not valid; give an integer >= 1.")
        self.samples = samples
        self._keys: Tensor | None = None
        self._store: PyTree | None = None
        self._known: Tensor | None = None

    def __repr__(self) -> str:
        """The options."""
        return f"BySample({self.samples})"

    def clear(self) -> None:
        """Forget all of them."""
        self._store = self._known = None

    @contextmanager
    def of(self, keys: Tensor) -> Iterator[None]:
        """A block whose calls of the layer are of these samples, `(B,)` integers, in this order.

        Raises:
            TypeError: keys that are no integers.
            ValueError: they are not `(B,)`, or there is no such sample.
        """
        if not isinstance(keys, Tensor) or keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool:
            kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(f"BySample.of: keys must be a tensor of integers, but is {kind}.")
        if keys.ndim != 1:
            raise ValueError(f"BySample.of: keys must be (B,), one for each sample, but is {tuple(keys.shape)}.")
        low, high = (int(keys.min()), int(keys.max())) if keys.numel() else (0, 0)
        if low < 0 or high >= self.samples:
            raise ValueError(f"BySample.of: keys are from {low} to {high}, but there are {self.samples} samples.")
        before, self._keys = self._keys, keys.long()
        try:
            yield
        finally:
            self._keys = before

    def begin(self, start: PyTree, solver: Method | None) -> tuple[PyTree, Method | None]:
        """The start and the solver of a solve that would begin at `start` if nothing were known."""
        if "torch._dynamo" in sys.modules:
            return _begin_uncompiled(self, start, solver)
        return self._begin(start, solver)

    def _begin(self, start: PyTree, solver: Method | None) -> tuple[PyTree, Method | None]:
        if self._keys is None:
            return start, solver
        leaves, spec = pytree.tree_flatten(start)
        if any(leaf.ndim < 1 or len(leaf) != len(self._keys) for leaf in leaves):
            shapes = [tuple(leaf.shape) for leaf in leaves]
            raise ValueError(f"BySample: {len(self._keys)} keys for a state of {shapes}; give one for each row.")
        if self._store is None or self._known is None or is_transformed():
            return start, solver
        if not _fits(self._store, start):
            return start, solver
        stored = pytree.tree_leaves(self._store)
        keys = self._keys.to(self._known.device)
        known = self._known.index_select(0, keys)
        found = [choose(known, s.index_select(0, keys), t.detach()) for s, t in zip(stored, leaves, strict=True)]
        return pytree.tree_unflatten(found, spec), solver

    def keep(self, solution: Solution) -> None:
        """Remember the solutions of the samples in question; failed ones begin anew."""
        if "torch._dynamo" in sys.modules:
            _keep_uncompiled(self, solution)
        else:
            self._keep(solution)

    def _keep(self, solution: Solution) -> None:
        if self._keys is None or is_transformed():
            return
        value = pytree.tree_map(lambda leaf: leaf.detach(), solution.value)
        with torch.inference_mode(False), torch.no_grad():
            if self._store is None or not _fits(self._store, value):
                self._store = pytree.tree_map(lambda t: t.new_zeros(self.samples, *t.shape[1:]), value)
                self._known = torch.zeros(self.samples, dtype=torch.bool, device=solution.status.device)
            assert self._known is not None
            keys = self._keys.to(self._known.device)
            pytree.tree_map(lambda s, t: s.index_copy_(0, keys, t.clone()), self._store, value)
            self._known.index_copy_(0, keys, (solution.status == int(Status.CONVERGED)).reshape(len(keys), -1).all(1))


def _fits(store: PyTree, value: PyTree) -> bool:
    (mine, my_spec), (others, spec) = pytree.tree_flatten(store), pytree.tree_flatten(value)
    return my_spec == spec and all(
        s.shape[1:] == t.shape[1:] and s.dtype == t.dtype and s.device == t.device
        for s, t in zip(mine, others, strict=True)
    )


# To a compiler the memory would be a constant of the first call.
_begin_uncompiled = _disable_dynamo(BySample._begin)
_keep_uncompiled = _disable_dynamo(BySample._keep)
