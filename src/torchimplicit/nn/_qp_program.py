"""A batch of convex quadratic programs, and points of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(eq=False, repr=False)
class Program:
    """`min ½zᵀQz + pᵀz` subject to `Gz ≤ h`, `Az = b`; the batch in front: `(B, n, n)`, `(B, n)`, `(B, m, n)`, ….

    Q is symmetric; there may be no rows in G or A. `sizes` `(B, 3)` has the largest absolute value in Q, in G and in A.
    """

    Q: Tensor
    p: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    sizes: Tensor

    def select(self, samples: Tensor) -> Program:
        """Some samples, by their indices."""
        return Program(*(getattr(self, f.name).index_select(0, samples) for f in fields(self)))

    def detach(self) -> Program:
        """The same without a history."""
        return Program(*(getattr(self, f.name).detach() for f in fields(self)))


@dataclass(eq=False, repr=False)
class Point:
    """A primal-dual point: `z` `(B, n)`, slack `s > 0` and multipliers `lam > 0` of `G`, multipliers `nu` of `A`."""

    z: Tensor
    s: Tensor
    lam: Tensor
    nu: Tensor

    def select(self, samples: Tensor) -> Point:
        """Some samples, by their indices."""
        return Point(*(getattr(self, f.name).index_select(0, samples) for f in fields(self)))

    def put(self, samples: Tensor, other: Point) -> Point:
        """This point, and another one for some samples, given by their indices."""
        return Point(*(getattr(self, f.name).index_copy(0, samples, getattr(other, f.name)) for f in fields(self)))

    def along(self, step: Point, primal: Tensor, dual: Tensor) -> Point:
        """The point `self + length·step`, with a length `(B,)` for each half."""
        primal, dual = primal[:, None], dual[:, None]
        return Point(
            torch.addcmul(self.z, primal, step.z),
            torch.addcmul(self.s, primal, step.s),
            torch.addcmul(self.lam, dual, step.lam),
            torch.addcmul(self.nu, dual, step.nu),
        )

    def where(self, samples: Tensor, other: Point) -> Point:
        """This point for some samples, `(B,)` bool, and another one for the rest."""
        return Point(
            *(torch.where(samples[:, None], getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )


def mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """`(B, m, n)` times `(B, n)`."""
    return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)


def largest(*vectors: Tensor) -> Tensor:
    """The largest absolute value in several `(B, k)`, `(B,)`; 0 if there is nothing."""
    some = [v for v in vectors if v.shape[1]]
    if not some:
        return vectors[0].sum(1)
    return (torch.cat(some, dim=1) if len(some) > 1 else some[0]).abs().amax(dim=1)


def sizes(Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """Those of `Program`; not finite where an entry is not."""
    return torch.stack([largest(t.flatten(1)) for t in (Q, G, A)], dim=1)
