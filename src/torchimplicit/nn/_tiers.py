"""The operator of a multi-tier monotone layer: circular convolutions on images of halved sizes, coupled downwards."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._operators import CircularMap, CircularOperator, Shifted, power_norm


@dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """`−2 A₂ᵀ P K`: from a tier to the next, P keeping every second pixel of each row and column.

    Attributes:
        down: K, on the images of the tier.
        filter: A₂, on those of the next.
        size: of the images of the tier.
    """

    down: CircularMap
    filter: CircularMap
    size: tuple[int, int]

    def mv(self, p: Tensor) -> Tensor:
        """`(B, n₁)` to `(B, n₂)`."""
        images = self.down.mv(p).reshape(len(p), -1, *self.size)
        return -2.0 * self.filter.rmv(images[:, :, ::2, ::2].flatten(1))

    def rmv(self, u: Tensor) -> Tensor:
        """`(B, n₂)` to `(B, n₁)`."""
        images = self.filter.mv(u).reshape(len(u), -1, self.size[0] // 2, self.size[1] // 2)
        spread = images.new_zeros(*images.shape[:2], *self.size)
        spread[:, :, ::2, ::2] = images
        return -2.0 * self.down.rmv(spread.flatten(1))


@dataclass(frozen=True, eq=False, repr=False)
class TieredOperator:
    """W in blocks: a circular operator on the diagonal for each tier, and a coupling to the next below it.

    States are the tiers' images, flattened, one after the other. The margin is that of the diagonal blocks where these
    leave room for the couplings, as `MonotoneTiers` makes them.
    """

    tiers: tuple[CircularOperator, ...]
    couplings: tuple[Coupling, ...]
    margin: float
    _resolvents: dict[float, "_TieredResolvent"] = field(init=False, default_factory=dict, repr=False)

    @property
    def unknowns(self) -> int:
        """n."""
        return sum(tier.unknowns for tier in self.tiers)

    def mv(self, p: Tensor) -> Tensor:
        """`W p`."""
        parts = self.parts(p)
        out = [tier.mv(part) for tier, part in zip(self.tiers, parts, strict=True)]
        for i, coupling in enumerate(self.couplings):
            out[i + 1] = out[i + 1] + coupling.mv(parts[i])
        return torch.cat(out, 1)

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ u`."""
        parts = self.parts(u)
        out = [tier.rmv(part) for tier, part in zip(self.tiers, parts, strict=True)]
        for i, coupling in enumerate(self.couplings):
            out[i] = out[i] + coupling.rmv(parts[i + 1])
        return torch.cat(out, 1)

    def parts(self, p: Tensor) -> list[Tensor]:
        """The tiers of a state, `(B, nᵢ)` each."""
        return list(p.split([tier.unknowns for tier in self.tiers], 1))

    @torch.no_grad()
    def resolvent(self, step_size: float) -> "_TieredResolvent":
        """By substitution, tier after tier."""
        if step_size not in self._resolvents:
            diagonal = tuple(tier.resolvent(step_size) for tier in self.tiers)
            self._resolvents[step_size] = _TieredResolvent(self, diagonal, step_size)
        return self._resolvents[step_size]

    def norm_estimate(self) -> float:
        """By a few steps of the power method; below the norm itself."""
        return self._estimate

    def norm_bound(self) -> float:
        """An upper bound: the tiers' norms, and those of the couplings."""
        return self._norm

    @cached_property
    def _estimate(self) -> float:
        matrices = self.tiers[0].matrices.real
        return power_norm(Shifted(self), torch.ones(1, self.unknowns, dtype=matrices.dtype, device=matrices.device))

    @cached_property
    def _norm(self) -> float:
        diagonal = max(tier.norm_bound() for tier in self.tiers)
        return diagonal + sum(2.0 * map_norm(c.down) * map_norm(c.filter) for c in self.couplings)

    def dense(self) -> Tensor:
        """`W`, `(n, n)`."""
        matrices = self.tiers[0].matrices.real
        return self.mv(torch.eye(self.unknowns, dtype=matrices.dtype, device=matrices.device)).mT


@dataclass(frozen=True, eq=False, repr=False)
class _TieredResolvent:
    """`(I + α (I − W))⁻¹` of a block triangular W."""

    operator: TieredOperator
    diagonal: tuple[CircularMap, ...]
    step_size: float

    def mv(self, p: Tensor) -> Tensor:
        """From the first tier to the last."""
        parts = self.operator.parts(p)
        out = [self.diagonal[0].mv(parts[0])]
        for coupling, tier, part in zip(self.operator.couplings, self.diagonal[1:], parts[1:], strict=True):
            out.append(tier.mv(torch.add(part, coupling.mv(out[-1]), alpha=self.step_size)))
        return torch.cat(out, 1)

    def rmv(self, u: Tensor) -> Tensor:
        """From the last tier to the first."""
        parts = self.operator.parts(u)
        out = [self.diagonal[-1].rmv(parts[-1])]
        for i in range(len(parts) - 2, -1, -1):
            pulled = self.operator.couplings[i].rmv(out[0])
            out.insert(0, self.diagonal[i].rmv(torch.add(parts[i], pulled, alpha=self.step_size)))
        return torch.cat(out, 1)


def map_norm(circular: CircularMap) -> float:
    """The two-norm of a circular map: that of the worst frequency."""
    return float(torch.linalg.matrix_norm(circular.right, 2).max())
