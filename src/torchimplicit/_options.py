"""Base of every configuration object: a frozen dataclass that refuses unknown and invalid options by name."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import torch


def nearest(word: str, valid: Iterable[str]) -> str:
    """A sentence that lists the valid names and points to the one closest to `word`."""
    names = list(valid)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Valid: {', '.join(names)}."


def refuse_unknown(call: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise `TypeError` for the first name in `given` that is not in `valid`, naming the nearest valid one."""
    names = list(valid)
    for name in given:
        if name not in names:
            raise TypeError(f"{call}: unknown option {name!r}; {nearest(name, names)}")


@dataclass(frozen=True, eq=False, repr=False)
class Options:
    """Base class of solvers, linear solvers and adjoints: hyper-parameters only, validated at construction.

    Raises:
        TypeError: for a name that is not a field; the message names the nearest valid one.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the names before dataclass' own `__init__` sees them."""
        if not torch.compiler.is_compiling():  # where the names of a class's fields are out of reach
            refuse_unknown(cls.__name__, kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    # Written once: what `dataclass` would write anew for each of fifty classes takes most of the package's import.

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return self is other or self._values() == cast("Self", other)._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{type(self).__qualname__}({options})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.compare)

    def _require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} is not valid; give {wanted}.")

    def _require_number(
        self, name: str, low: float, high: float = math.inf, *, inside: bool = False, optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        ok = False
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            ok = low < value < high if inside else low <= value <= high
        interval = f"{'(' if inside else '['}{low}, {high}{')' if inside or math.isinf(high) else ']'}"
        self._require(name, ok, f"a finite number in {interval}{' or None' if optional else ''}")

    def _require_count(self, name: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
        self._require(name, ok, f"an integer >= {low}{' or None' if optional else ''}")

    def _require_choice(self, name: str, choices: Iterable[str]) -> None:
        value = getattr(self, name)
        names = list(choices)
        if value not in names:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} is not known; {nearest(str(value), names)}")
