"""The one loop as an operator of the graph: `while_loop`, for as long as any sample runs."""

from abc import ABC, abstractmethod
from math import lcm
from operator import index

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from ._books import Ledger, Pace, closed, entered, opened
from ._equation import Evaluated, TracedEquation

State = tuple[Tensor, ...]
_PARTS = len(Ledger._fields)


class TracedSteps(ABC):
    """A solver's steps on tensors alone.

    Attributes:
        max_steps: at most, unless the call says otherwise.
        check_every: steps between two entries into the books.
        patience: of the solver.
        progress: of the solver.
        period: steps after which the steps repeat.
    """

    max_steps: int
    check_every: int
    patience: int
    progress: float
    period: int = 1

    @abstractmethod
    def init(self, equation: TracedEquation) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """One step of all samples, and the failures it knows of; no tensor may be one that was handed in.

        Args:
            equation: what is solved.
            phase: steps taken, modulo `period`.
            taken: steps taken, `()`.
            at: the iterates and fn there.
            state: the solver's own.
            active: the samples that run, `(B,)`.
        """


def solve(equation: TracedEquation, steps: TracedSteps, z: Tensor, max_steps: int) -> Ledger:
    """Run the steps from `z`, `(B, n)`, until every sample is settled, at most `max_steps` of them."""
    equation.begin(z)
    zero = torch.zeros((), dtype=torch.long, device=z.device)
    carried = (zero, *opened(equation), z.clone(), equation.start[1].clone(), *steps.init(equation))
    # With `dynamic=True` an integer is no constant either, until it is asked for as an index.
    steps.check_every, steps.period, max_steps = (index(n) for n in (steps.check_every, steps.period, max_steps))
    block = min(lcm(steps.check_every, steps.period), max_steps)
    if block:
        carried = _blocks(equation, steps, carried, block, max_steps)
    return closed(equation, Ledger(*carried[1 : 1 + _PARTS]), carried[0].clamp_max(max_steps))


def _blocks(
    equation: TracedEquation, steps: TracedSteps, carried: tuple[Tensor, ...], block: int, max_steps: int
) -> tuple[Tensor, ...]:
    """Blocks of so many steps, for as long as any sample runs; what the last one has beyond `max_steps` is ignored."""
    every, pace = steps.check_every, Pace.of(steps.patience, steps.progress, equation.first)
    whole, rest = max_steps % block == 0, max_steps % block

    def running(*carried: Tensor) -> Tensor:
        return Ledger(*carried[1 : 1 + _PARTS]).active.any() & (carried[0] < max_steps)

    def body(*carried: Tensor) -> tuple[Tensor, ...]:
        step, books = carried[0], Ledger(*carried[1 : 1 + _PARTS])
        at, state = (carried[1 + _PARTS], carried[2 + _PARTS]), carried[3 + _PARTS :]
        for i in range(1, block + 1):
            at, state, failure = steps.step(equation, (i - 1) % steps.period, step, at, state, books.active)
            step = step + 1
            regular = i % every == 0 or i == block
            if regular or i == rest:
                after = entered(equation, books, step, at, failure, pace)
                if not whole:
                    due = step <= max_steps if regular else step == max_steps
                    after = Ledger(*(torch.where(due, new, old) for new, old in zip(after, books, strict=True)))
                books = after
        return (step, *books, *(t.clone() for t in at), *state)

    return while_loop(running, body, carried)
