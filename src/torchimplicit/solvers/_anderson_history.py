"""The history of Anderson acceleration: an orthonormal one for each sample, and who rests from it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

LOOK = 4
"""Steps between two looks at whether acceleration pays; rests end at looks."""
FEW_UNKNOWNS = 256
"""Up to which the algebra of a sample costs less than to find out whether it can do without: it is not asked."""
_FIRST_GAIN, _GAIN = 0.25, 0.07
"""Share of the fall of the residual (of its logarithm) that acceleration must have, relative to the map's own: at the
first look, and after that."""


@dataclass(eq=False, repr=False)
class History:
    """Differences of the last iterates of each sample, orthonormalised, in a ring of `m` rows; empty rows are zero.

    `A` of the `B` samples have one: those that are accelerated and, as long as they are few, some that rest from it.
    `plain` is `z + mixing·r`.

    Attributes:
        pairs: rows `[q | w]`, `(A, m, 2n)`: `q` of the differences of r, `w` the same combination of those of `plain`.
        gamma: `qᵀ r` of each row with the residual at the current iterate, `(A, 1, k)`, `k` rows being written.
        residual: at the current iterate, `(A, 1, n)`.
        plain: there, `(A, 1, n)`.
        norm: of the residual, `(A,)`.
        wait: step up to which a sample is not accelerated, after a refusal, `(B,)`.
        pause: length of the next wait, `(B,)`.
        rest: step up to which a sample rests because acceleration did not pay, `(B,)`.
        longer: length of the next rest, `(B,)`.
        seen: norm of the residual at the last look, `(B,)`.
        looked: when that was.
        ahead: the step of the next look.
        taken: steps so far.
        rested: whether any sample has.
        waiting: the last step for which any sample waits.
        awake: the samples that have a history, by their indices, `(A,)`; None while all have.
        dozing: those of them that rest nevertheless, `(A,)` bool, whose history stays empty; None if none does.
        asleep: the step up to which everyone rests.
        next: the row that the next difference overwrites.
        filled: how many rows have been written.
    """

    pairs: Tensor
    gamma: Tensor
    residual: Tensor
    plain: Tensor
    norm: Tensor
    wait: Tensor
    pause: Tensor
    rest: Tensor
    longer: Tensor
    seen: Tensor
    looked: int = 0
    ahead: int = 1
    taken: int = 0
    rested: bool = False
    waiting: int = 0
    awake: Tensor | None = None
    dozing: Tensor | None = None
    asleep: int = 0
    next: int = 0
    filled: int = 0
    rows: tuple[Tensor, ...] = field(init=False)
    pair: tuple[Tensor, Tensor, Tensor] = field(init=False)
    known: tuple[Tensor, Tensor, Tensor] = field(init=False)
    overlap: tuple[Tensor, tuple[Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """Make the views, which every step needs, once: of each row, of a row in the making and its halves."""
        awake, _, width = self.pairs.shape
        n = width // 2
        self.rows = self.pairs.split(1, dim=1)
        pair = self.pairs.new_empty(awake, 1, width)
        self.pair = pair, pair[:, :, :n], pair[:, :, n:]
        self.view()

    def view(self) -> None:
        """Make the views of the rows that have been written, of the whole, of `qᵀ` and of `w`; room for products."""
        known, n = self.pairs[:, : self.filled], self.pairs.shape[2] // 2
        self.known = known, known[:, :, :n].transpose(1, 2), known[:, :, n:]
        overlap = self.pairs.new_empty(len(self.pairs), 1, self.filled)
        self.overlap = overlap, overlap.unbind(2)

    def take(self, t: Tensor) -> Tensor:
        """Of a tensor with a row for every sample those of the samples with a history."""
        return t if self.awake is None else t.index_select(0, self.awake)

    def spread(self, rows: Tensor, others: Tensor) -> Tensor:
        """A row for every sample: those given of the samples with a history, `others` of the rest."""
        return rows if self.awake is None else others.index_copy(0, self.awake, rows)

    def select(self, samples: Tensor) -> "History":
        """The history of some samples alone, by their indices."""
        rows, awake = samples, None
        if self.awake is not None and not len(self.awake):
            return replace(self, **{name: getattr(self, name).index_select(0, samples) for name in _OF_ALL})
        if self.awake is not None:
            place = self._places().index_select(0, samples)
            awake = (place >= 0).nonzero()[:, 0]
            rows = place.index_select(0, awake)
        return replace(
            self,
            pairs=self._written(rows),
            **{name: getattr(self, name).index_select(0, rows) for name in _OF_THE_AWAKE},
            dozing=None if self.dozing is None else self.dozing.index_select(0, rows),
            **{name: getattr(self, name).index_select(0, samples) for name in _OF_ALL},
            awake=awake,
        )

    def _written(self, rows: Tensor) -> Tensor:
        """The pairs of some, by their places; what has not been written is not copied, nor read before it is."""
        pairs = self.pairs.new_empty(len(rows), *self.pairs.shape[1:])
        if self.filled:
            pairs[:, : self.filled] = self.known[0].index_select(0, rows)
        return pairs

    def _places(self) -> Tensor:
        """Where among the samples with a history each sample is, `(B,)`; −1 where it has none."""
        if self.awake is None:
            return torch.arange(len(self.rest), device=self.rest.device)
        places = torch.full_like(self.rest, -1)
        return places.index_copy_(0, self.awake, torch.arange(len(self.awake), device=self.rest.device))

    def rouse(self, now: Tensor, residual: Tensor, plain: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the histories of the samples that are awake now and give empty ones to the new.

        Args:
            now: indices of the samples that are awake.
            residual: of all samples, `(B, n)`.
            plain: of all.
            norm: of all.

        Returns:
            Residual, plain step and norm of the samples awake.
        """
        if not len(now):
            for name in ("pairs", *_OF_THE_AWAKE):
                setattr(self, name, getattr(self, name)[:0])
            self.awake, self.dozing, self.filled, self.next = now, None, 0, 0
            return self.residual[:, 0], self.plain[:, 0], self.norm
        if self.dozing is not None:
            self._empty(self.dozing, self.take(residual), self.take(plain), self.take(norm))
            self.dozing = None
        old = None if not len(self.pairs) else self._places().index_select(0, now)
        self.awake = now if len(now) < len(self.rest) else None
        here = self.take(residual), self.take(plain), self.take(norm)
        if old is None:
            self.residual, self.plain, self.norm = here[0][:, None], here[1][:, None], here[2]
            self.filled = self.next = 0
            self.pairs = self.pairs.new_empty(len(now), *self.pairs.shape[1:])
            self.gamma = norm.new_zeros(len(now), 1, 0)
        else:
            new = old < 0
            self.pairs = self._written(old.clamp_min_(0))
            for name in _OF_THE_AWAKE:
                setattr(self, name, getattr(self, name).index_select(0, old))
            self._empty(new, *here)
        self.__post_init__()
        return here

    def doze(self, awake: Tensor, residual: Tensor, plain: Tensor, norm: Tensor) -> None:
        """Let only some of the samples with a history, `(A,)` bool, be accelerated; those roused have an empty one.

        Args:
            awake: of the samples with a history.
            residual: of all samples, `(B, n)`.
            plain: of all.
            norm: of all.
        """
        asleep = None if bool(awake.all()) else awake.logical_not()
        roused = None if self.dozing is None else self.dozing & awake
        if roused is not None and bool(roused.any()):
            self._empty(roused, self.take(residual), self.take(plain), self.take(norm))
        if asleep is not None:
            self.pairs[:, : self.filled].masked_fill_(asleep[:, None, None], 0.0)
            self.gamma = self.gamma.masked_fill(asleep[:, None, None], 0.0)
        self.dozing = asleep

    def _empty(self, rows: Tensor, residual: Tensor, plain: Tensor, norm: Tensor) -> None:
        """Empty the history of some, `(A,)` bool, as if their last step had been of length zero.

        The next difference then leaves an empty row.
        """
        where = rows.nonzero()[:, 0]
        if len(where):
            self.pairs[:, : self.filled].index_fill_(0, where, 0.0)
            self.gamma = self.gamma.index_fill(0, where, 0.0)
            column = rows[:, None, None]
            self.residual = torch.where(column, residual[:, None], self.residual)
            self.plain = torch.where(column, plain[:, None], self.plain)
            self.norm = torch.where(rows, norm, self.norm)

    def tire(self, gamma: Tensor, norm: Tensor) -> bool:
        """Send the samples to rest for which the last step's acceleration did not pay; whether there are any.

        The step went from a residual of size `self.norm`, of which `g` was left by the acceleration, to `norm`: the
        map contracted by `c = norm / (g · self.norm)`. It pays if `ln g < p ln c`, both below 1, where `p` is
        larger at the first look, which a short history flatters. In other words, if
        `2 ln g < 2p/(1 + p) ln (norm / self.norm)`, with `g² = 1 − (‖γ‖ / self.norm)²`.

        Args:
            gamma: the step's coefficients, `(A, 1, k)`.
            norm: of the residual after it, `(A,)`.
        """
        if not self.filled or not len(norm):
            return False
        share = (torch.linalg.vector_norm(gamma, dim=2)[:, 0] / self.norm).square_()
        left = share.neg_().log1p_()
        fall = (norm / self.norm).log_()
        first, later = (2 * p / (1 + p) for p in (_FIRST_GAIN, _GAIN))
        if self.taken <= LOOK:
            fall *= first
        elif not self.rested:
            fall *= later
        else:
            fall *= torch.where(self.take(self.rest) < self.taken - LOOK, later, first)
        # Nobody who was not accelerated, of whom all is left.
        idle = ((left > fall) & (left < 0.0)).nonzero()[:, 0]
        if not len(idle):
            return False
        self.rested = True
        samples = idle if self.awake is None else self.awake.index_select(0, idle)
        longer = self.longer.index_select(0, samples)
        self.longer.index_copy_(0, samples, 2 * longer)
        self.rest.index_copy_(0, samples, self.taken + longer)
        return True

    @property
    def judges(self) -> bool:
        """Whether to look at what acceleration brings."""
        return self.plain.shape[2] > FEW_UNKNOWNS

    def look_ahead(self) -> None:
        """Say when to look again: where there is nothing to judge, when a sample's rest ends."""
        if self.judges:
            self.ahead = self.taken - self.taken % LOOK + LOOK
        else:
            never = torch.iinfo(self.rest.dtype).max
            self.ahead = int(self.rest.masked_fill(self.rest <= self.taken, never).min()) if self.rested else never

    def put_off(self, ended: Tensor, norm: Tensor, target: Tensor, few: int) -> None:
        """Let the samples rest on that are so near their target that a few more plain steps bring them there.

        Args:
            ended: indices of samples whose rest has ended.
            norm: of the residual, of all samples.
            target: what it must come to, of all samples.
            few: how many plain steps.
        """
        now, before, wanted = (t.index_select(0, ended) for t in (norm, self.seen, target))
        later = (now / before).pow_(few / (self.taken - self.looked)).mul_(now)
        near = ended.index_select(0, (later <= wanted).nonzero()[:, 0])
        self.rested = self.rested or bool(len(near))
        self.rest.index_fill_(0, near, max(2 * LOOK, self.taken + LOOK))


_OF_THE_AWAKE = ("gamma", "residual", "plain", "norm")
_OF_ALL = ("wait", "pause", "rest", "longer", "seen")
