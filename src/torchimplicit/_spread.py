"""One solve over several processes: each holds some of the samples, and all solve the whole, in step.

A cell that communicates (batch statistics over all processes, say) must be called by every process as often as by any
other, or they wait for each other for ever; and what it computes for one process's samples depends on the others'. So
the states are gathered: every process runs the same algorithm on the same numbers and comes to the same decisions. Of
each evaluation, and of each product with the Jacobian, it computes its own part. Solvers need not know, and what is
found is what one process would have found with all samples.

What the processes compute from the same numbers must be the same to the last bit, as it is on equal machines with equal
numbers of threads. With each part goes a fingerprint of the state that it was computed for: where these differ, all
processes raise an error, instead of parting ways.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ._layout import Layout
from ._solution import PyTree

ProcessGroup = Any
"""A `torch.distributed.ProcessGroup`, or `"world"`; there need not be any in a build of torch."""

_HEADER = 2


@dataclass(frozen=True, repr=False)
class SpreadLayout(Layout):
    """The layout of a state whose samples are spread over a group: matrices are of all, pytrees of the own ones.

    Attributes:
        own: of this process's part.
        group: the processes.
        counts: rows of each process's part, or columns if the whole is one problem.
        rank: which part is this process's.
        clock: how many parts have been exchanged.
    """

    own: Layout
    group: ProcessGroup
    counts: tuple[int, ...]
    rank: int
    clock: list[int]

    shared: ClassVar[bool] = True

    @staticmethod
    def over(group: ProcessGroup, own: Layout) -> SpreadLayout:
        """The layout of the whole, of which every process of the group gives its own part's; all must call.

        Raises:
            ValueError: the parts do not fit together.
        """
        rows, columns = own.matrix_shape
        mine = torch.tensor([len(own.batch_shape) > 0, rows, columns, own.dtype.itemsize], device=own.device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group)
        kinds, rows_of, columns_of, sizes = zip(*(part.tolist() for part in parts), strict=True)
        if len({*zip(kinds, sizes, strict=True)}) > 1 or (kinds[0] and len(set(columns_of)) > 1):
            raise ValueError(
                "process_group: the processes' states must have the same dtypes and batch_dims, and samples of one "
                f"size, but their (rows, unknowns) are {[*zip(rows_of, columns_of, strict=True)]}; give parts of one "
                "batch."
            )
        counts = rows_of if kinds[0] else columns_of
        whole = {
            **{f.name: getattr(own, f.name) for f in fields(Layout)},
            "batch_shape": torch.Size((sum(counts),) if kinds[0] else ()),
            "sizes": own.sizes if kinds[0] else (sum(counts),),
            "simple": False,
            "bare": False,
        }
        return SpreadLayout(**whole, own=own, group=group, counts=counts, rank=dist.get_rank(group), clock=[0])

    def pack(self, leaves: list[Tensor]) -> Tensor:
        """Leaves of each process to the matrix of all; differentiable."""
        return _Gather.apply(self.own.pack(leaves), self)  # pyright: ignore[reportReturnType]

    def unpack(self, matrix: Tensor) -> PyTree:
        """The matrix of all to this process's pytree; differentiable."""
        own: Tensor = _Own.apply(matrix, self)  # pyright: ignore[reportAssignmentType]
        return self.own.unpack(own)

    def rounded(self, matrix: Tensor) -> Tensor:
        """The matrix as the leaves can hold it."""
        if len(set(self.dtypes)) == 1:
            return matrix.to(self.dtypes[0].to_real()).to(self.dtype)
        return super().rounded(matrix)

    def per_sample(self, vector: Tensor) -> Tensor:
        """A vector of figures of all samples as those of this process's, in its batch shape."""
        if self.own.batch_shape:
            vector = vector.narrow(-1, sum(self.counts[: self.rank]), self.counts[self.rank])
        return self.own.per_sample(vector)

    @property
    def _dim(self) -> int:
        return 0 if self.own.batch_shape else 1

    def part(self, matrix: Tensor) -> Tensor:
        """This process's rows or columns of the matrix of all."""
        self.clock[1:] = [_fingerprint(matrix)]
        return matrix.narrow(self._dim, sum(self.counts[: self.rank]), self.counts[self.rank]).clone()

    def gather(self, own: Tensor) -> Tensor:
        """The matrix of all, of each process's rows or columns.

        Raises:
            RuntimeError: the processes are not where they should all be.
        """
        other = own.shape[1 - self._dim]
        longest = max(self.counts) * other
        flat = own.new_zeros(longest + _HEADER)
        flat[: own.numel()] = own.reshape(-1)
        self.clock[0] += 1
        flat[longest:] = flat.new_tensor([self.clock[0] % 2**10, self.clock[1] if len(self.clock) > 1 else 0.0])
        parts = [torch.empty_like(flat) for _ in self.counts]
        dist.all_gather(parts, flat, self.group)
        headers = torch.stack([part[longest:] for part in parts])
        if not torch.equal(headers, headers[:1].expand_as(headers)):
            raise RuntimeError(
                "process_group: the processes have come to different states, although they began with the same ones: "
                "they need machines, libraries and numbers of threads that compute alike, and all must make the same "
                "calls and backward passes."
            )
        shapes = ((count, other) if self._dim == 0 else (other, count) for count in self.counts)
        return torch.cat([p[: a * b].reshape(a, b) for p, (a, b) in zip(parts, shapes, strict=True)], dim=self._dim)


class _Gather(torch.autograd.Function):
    """Parts to the whole, which every process then holds; the gradient with respect to it they all hold, too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, layout: SpreadLayout) -> Tensor:
        ctx.layout = layout
        return layout.gather(own.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch._C._functorch.is_legacy_batchedtensor(grads[0]):  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError("process_group: products are taken one by one")
        return _Own.apply(grads[0], ctx.layout), None


class _Own(torch.autograd.Function):
    """The whole to the own part; the transpose of `_Gather`, as each is a sum over what the processes do."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, layout: SpreadLayout) -> Tensor:
        ctx.layout = layout
        return layout.part(matrix.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], ctx.layout), None


def _fingerprint(matrix: Tensor) -> int:
    """Ten bits that depend on every bit of a matrix."""
    words = matrix.contiguous().view(torch.int32 if matrix.itemsize == 4 else torch.int64)
    return int(words.sum().item()) % 2**10


def resolve_group(group: ProcessGroup | Literal["world"] | None) -> ProcessGroup | None:
    """The group that is meant; None where a process is alone.

    Raises:
        TypeError: it is none.
    """
    if group is None:
        return None
    if isinstance(group, str):
        if group != "world":
            raise TypeError(f'process_group={group!r} is no group; give a torch.distributed.ProcessGroup, or "world".')
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    elif not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group={group!r} is no group; give a torch.distributed.ProcessGroup, such as dist.group.WORLD "
            'once torch.distributed is initialised, or "world".'
        )
    return group if dist.get_world_size(group) > 1 else None
