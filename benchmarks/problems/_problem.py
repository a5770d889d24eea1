"""One test problem: an equation `F(z) = 0`, where to start, and what is known of its roots."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any
"""A torch tensor, a NumPy array or a JAX array: the functions are written once for all three."""

Function = Callable[[Array, Any], Array]
"""`fn(z, xp)`: the residual of every row of z, `(..., n) -> (..., n)`; xp is `torch`, `numpy` or `jax.numpy`."""

Point = tuple[float, ...]
"""A point, n numbers."""


@dataclass(frozen=True)
class Problem:
    """A system of n equations in n unknowns.

    Attributes:
        name: unique, in lower case, for tables and the command line.
        start: the starting point, n numbers.
        fn: the residual, batched over leading dims; see `Function`.
        roots: the roots that are known in closed form or to all digits; there may be others.
        has_root: whether a (finite) root exists at all.
        tags: the sets that the problem belongs to, such as "classical", and traits such as "singular root".
    """

    name: str
    start: Point
    fn: Function
    roots: tuple[Point, ...] = ()
    has_root: bool = True
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        if self.name != self.name.lower() or " " in self.name:
            raise ValueError(f"name {self.name!r}: give it in lower case, with hyphens for spaces")
        if self.roots and not self.has_root:
            raise ValueError(f"{self.name}: has_root=False, yet roots={self.roots}")
        wrong = [root for root in self.roots if len(root) != self.n]
        if wrong:
            raise ValueError(f"{self.name}: a root of {self.n} unknowns has {self.n} numbers, not {len(wrong[0])}")

    @property
    def n(self) -> int:
        """The number of unknowns, and of equations."""
        return len(self.start)
