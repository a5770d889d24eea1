"""What a layer guarantees about its equilibrium, in numbers, with the source of each."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Certificate:
    """An equilibrium exists and is unique for every input, if `well_posed`; how fast it is found, what x does to it.

    Attributes:
        well_posed: whether the condition of existence and uniqueness holds for the present parameters.
        margin: by how much: the m of `⟨(I − W) p, p⟩ ≥ m ‖p‖²`, or `1 − factor` of a contraction; None where the
            condition is not of this kind.
        factor: a bound, in the norm named by `norm`, of the factor by which a step of the layer's own iteration
            contracts: of `Picard` for a contraction, of the splitting for a monotone layer; None where there is no
            uniform one.
        lipschitz: a bound of the layer's Lipschitz constant from x to its output; None where there is none.
        norm: of these figures: `"2"` or `"inf"`, with weights where it says so.
        source: of the statements.
    """

    well_posed: bool
    margin: float | None
    factor: float | None
    lipschitz: float | None
    norm: str
    source: str

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("margin", "factor", "lipschitz"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise ValueError(f"Certificate: {name} is NaN; the layer's parameters are not finite.")

    def __str__(self) -> str:
        """One line."""
        told = [
            f"{name} {value:.3g}"
            for name, value in (("margin", self.margin), ("factor", self.factor), ("Lipschitz", self.lipschitz))
            if value is not None
        ]
        head = "unique equilibrium" if self.well_posed else "no guarantee"
        return f"{head}: {', '.join(told)} ({self.norm}-norm; {self.source})" if told else f"{head} ({self.source})"
