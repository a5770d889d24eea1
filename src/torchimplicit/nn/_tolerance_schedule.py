"""`ToleranceSchedule`: solve loosely early in training, when the weights are far from good anyway, and tightly late."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..diagnostics import is_implicit
from ..solvers import Auto, Method


class ToleranceSchedule:
    """The relative tolerance of every implicit layer of a model, from `start` down to `end` in equal factors.

    Solvers are frozen, so a layer is given others: `layer.solver = dataclasses.replace(layer.solver, rtol=…)`, which is
    what this does, once at the beginning and at each `step()`. After `steps` of them, and inside `final()`, each layer
    has the very solver that it came with. Meanwhile no layer is given an rtol tighter than one it has, and its `atol`
    is kept.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.TanhEquilibrium(8, solver=ti.Anderson(rtol=1e-5))
    >>> schedule = ti.nn.ToleranceSchedule(layer, start=1e-1, end=1e-5, steps=4)
    >>> seen = []
    >>> for _ in range(5):  # an epoch, say
    ...     seen.append(f"{layer.solver.rtol:.0e}")
    ...     schedule.step()
    >>> seen
    ['1e-01', '1e-02', '1e-03', '1e-04', '1e-05']

    Gradients are those of the equation linearised at what was found, as precise as the value: a looser one is a biased
    one. `Implicit(rtol=…)`, the tolerance of the backward solve, stays as it is.

    Args:
        model: its layers, at any depth.
        start: rtol of the first phase.
        end: of the last one, at which the layers' own solvers take over.
        steps: calls of `step()` until then.

    Raises:
        ValueError: an option out of range; a model without implicit layers.
    """

    def __init__(self, model: nn.Module, *, start: float = 1e-2, end: float = 1e-5, steps: int) -> None:
        for name, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(f"ToleranceSchedule: {name}={value!r} is not valid; give a number between 0 and 1.")
        if end > start:
            raise ValueError(f"ToleranceSchedule: end={end!r} is looser than start={start!r}; give end <= start.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"ToleranceSchedule: steps={steps!r} is not valid; give an integer >= 1.")
        layers: list[Any] = [module for module in model.modules() if is_implicit(module)]
        if not layers:
            raise ValueError(f"ToleranceSchedule: {type(model).__name__} has no implicit layer.")
        self.start, self.end, self.steps = start, end, steps
        self._own: list[tuple[Any, Method | None]] = [(layer, layer.solver) for layer in layers]
        self._taken = 0
        self._apply()

    @property
    def rtol(self) -> float | None:
        """The tolerance now; None once the layers have their own solvers."""
        if self._taken >= self.steps:
            return None
        return self.start * (self.end / self.start) ** (self._taken / self.steps)

    def step(self) -> None:
        """Go on to the next tolerance."""
        self._taken += 1
        self._apply()

    @contextmanager
    def final(self) -> Iterator[None]:
        """A block, such as an evaluation, in which the layers have their own solvers."""
        try:
            self._set(None)
            yield
        finally:
            self._apply()

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on: the steps taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another schedule with the same options was."""
        self._taken = state["taken"]
        self._apply()

    def _apply(self) -> None:
        self._set(self.rtol)

    def _set(self, rtol: float | None) -> None:
        for layer, own in self._own:
            solver = Auto() if own is None else own
            layer.solver = own if rtol is None else replace(solver, rtol=max(rtol, solver.rtol or 0.0))
