"""The memory of Broyden's methods: the last secant pairs of each sample, and the small matrix that makes H of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..linear import LowRank


@dataclass(eq=False, repr=False)
class Memory(ABC):
    """The last two points of each sample, in turn, and in a ring the differences of the last `m + 1`.

    A point is `[q | z + σ r]`, with q for the update to choose; a pair is a point less the next. With `s = Δz`,
    `y = −Δr` and `w = s − σ y` its second half is `−w`. All is written in place, through views that are made once.
    Where a pair is not in use its row is zero, and `small` is the identity.

    Attributes:
        rows: the two points, then the pairs, `(B, 2 + m, 2n)`.
        small: transposed, what makes coefficients of the products with the pairs, `(B, m, m)`.
        gamma: the pairs' coefficients in the next step, `(B, 1, m)`.
        scale: σ, `(B,)`.
        norm: of the residual, `(B,)`.
        bare: the samples that had to drop their pairs in the last step, `(B,)` bool; None if none had to.
        taken: steps so far.
    """

    rows: Tensor
    small: Tensor
    gamma: Tensor
    scale: Tensor
    norm: Tensor
    bare: Tensor | None = None
    taken: int = 0
    left: Tensor = field(init=False)
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make the views: of the rows and their halves, of the small matrix, of room for products with the pairs."""
        batch, count, width = self.rows.shape
        n, m = width // 2, count - 2
        self.left, self.right = self.rows[:, 2:, :n], self.rows[:, 2:, n:]
        self._left_t = self.left.transpose(1, 2)
        self._rows = self.rows.unbind(1)
        self._plain = self.rows[:, :2, n:].split(1, dim=1)
        self._products = self.rows.new_empty(batch, 2, m)

    @classmethod
    def begin(cls, point: tuple[Tensor, Tensor], history: int, scale: Tensor, norm: Tensor) -> "Memory":
        """At a point, whose halves `(B, n)` are given, and with no pairs."""
        batch, n = point[0].shape
        rows = norm.new_zeros(batch, 2 + history, 2 * n)
        torch.cat(point, 1, out=rows[:, 0])
        small = torch.eye(history, dtype=norm.dtype, device=norm.device).repeat(batch, 1, 1)
        return cls(rows, small, norm.new_zeros(batch, 1, history), scale, norm)

    @property
    def history(self) -> int:
        """Pairs at most."""
        return self.small.shape[1]

    def move(self) -> Tensor:
        """`z + H r`, `(B, n)`."""
        return torch.baddbmm(self._plain[self.taken % 2], self.gamma, self.right, alpha=-1)[:, 0]

    def drop(self, samples: Tensor) -> None:
        """Let some samples, `(B,)` bool, have no pairs."""
        self.rows[:, 2:].masked_fill_(samples[:, None, None], 0.0)
        identity = torch.eye(self.history, dtype=self.small.dtype, device=self.small.device)
        self.small.copy_(torch.where(samples[:, None, None], identity, self.small))

    def replace_plain(self, plain: Tensor) -> None:
        """Put another plain step, `(B, n)`, from the point at hand in the place of that which is known."""
        self._plain[self.taken % 2].copy_(plain[:, None])

    def extend(self, point: tuple[Tensor, Tensor], step: Tensor, rest: Tensor | None) -> None:
        """Go on to a new point, and put the pair in the place of the oldest.

        Args:
            point: its halves, `(B, n)` each.
            step: `σ r` there, `(B, n)`.
            rest: the samples that keep the pairs that they have, `(B,)` bool; None if all go on.
        """
        old, slot = self.taken % 2, self.taken % self.history
        new, pair = self._rows[1 - old], self._rows[2 + slot]
        kept = None if rest is None else (pair.clone(), self.small.clone())
        torch.cat(point, 1, out=new)
        torch.sub(self._rows[old], new, out=pair)
        self._update(1 - old, slot)
        if rest is not None and kept is not None:
            pair.copy_(torch.where(rest[:, None], kept[0], pair))
            self.small.copy_(torch.where(rest[:, None, None], kept[1], self.small))
        self.gamma = self._coefficients(step)
        self.taken += 1

    @abstractmethod
    def _update(self, point: int, slot: int) -> None:
        """Make the small matrix that with a new pair, given the rows of point and pair."""

    @abstractmethod
    def _coefficients(self, step: Tensor) -> Tensor:
        """Of the pairs in the next step, `(B, 1, m)`."""

    @abstractmethod
    def _factor(self) -> Tensor:
        """R of `H = σ I − W'ᵀ R`, with the second halves of the pairs as the rows of W', `(B, m, n)`."""

    def inverse(self) -> LowRank:
        """H; without the pairs where they are not finite."""
        left, right = -self.right, self._factor()
        usable = (left.isfinite() & right.isfinite()).flatten(1).all(dim=1)[:, None, None]
        return LowRank(self.scale, torch.where(usable, left, 0.0), torch.where(usable, right, 0.0))


@dataclass(eq=False, repr=False)
class Bad(Memory):
    """For the bad update: `q = r`, pairs `[y | −w]`, and `small` is `N⁻¹` with N the upper triangle of `YᵀY`."""

    def __post_init__(self) -> None:
        """Make the views."""
        super().__post_init__()
        self._units = torch.eye(self.history, dtype=self.small.dtype, device=self.small.device).split(1)
        self._lines, self._columns = self.small.split(1, dim=1), self.small.unbind(2)
        self._of_r, self._of_y = self._products.split(1, dim=1)
        self._own = self._of_y.split(1, dim=2)
        self._both: dict[tuple[int, int], Tensor] = {}

    def _update(self, point: int, slot: int) -> None:
        """The new last column of N⁻¹ is `(1 − N⁻¹ Yᵀy) / yᵀy`, the 1 in the pair's own place; the rest stays.

        The first row and column go with the oldest pair: below the diagonal there is nothing that would be missed.
        """
        both = self._both.get((point, slot))
        if both is None:
            both = self.rows[:, point : slot + 3 : slot + 2 - point, : self.left.shape[2]]  # two rows, r and y
            self._both[point, slot] = both
        torch.bmm(both, self._left_t, out=self._products)
        self._columns[slot].zero_()
        line = torch.baddbmm(self._units[slot], self._of_y, self.small, alpha=-1)
        # Without a change of the residual the pair is zero, and is not used.
        torch.div(line, self._own[slot].clamp_min_(torch.finfo(line.dtype).tiny), out=self._lines[slot])

    def _coefficients(self, step: Tensor) -> Tensor:
        return torch.bmm(self._of_r, self.small)

    def _factor(self) -> Tensor:
        return torch.bmm(self.small.transpose(1, 2), self.left)


@dataclass(eq=False, repr=False)
class Good(Memory):
    """For the good update: `q = z`, pairs `[−s | −w]`, and `small` is −N, `Nᵢⱼ = σ sᵢᵀyⱼ`, less `sᵢᵀsⱼ` for `i > j`."""

    def __post_init__(self) -> None:
        """Make the views."""
        super().__post_init__()
        batch, count, width = self.rows.shape
        self._halves = self.rows.view(batch, count, 2, width // 2).unbind(1)
        self._first = self.rows[:, :, : width // 2].split(1, dim=1)
        self._right_t = self.right.transpose(1, 2)
        self._lines, self._column = self.small.unbind(1), self.small.transpose(1, 2).split(1, dim=1)
        self._of_s, self._of_w = self._products.unbind(1)

    def _update(self, point: int, slot: int) -> None:
        """The row of −N that belongs to the pair is `sᵀW`, and then the column `Sᵀ(w − s)`."""
        torch.bmm(self._first[2 + slot], self._right_t, out=self._column[slot])
        torch.bmm(self._halves[2 + slot], self._left_t, out=self._products)
        torch.sub(self._of_w, self._of_s, out=self._lines[slot])

    def _coefficients(self, step: Tensor) -> Tensor:
        return torch.linalg.solve_ex(self.small, torch.bmm(step[:, None], self._left_t), left=False)[0]

    def _factor(self) -> Tensor:
        return torch.linalg.solve_ex(self.small.transpose(1, 2), self.scale[:, None, None] * self.left)[0]
