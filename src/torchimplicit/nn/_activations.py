"""Activations as proximal operators: increasing functions with slopes in [0, 1], and what splitting needs of them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .._options import Options, nearest

_NEWTON = 60
"""Steps of a safeguarded Newton iteration for one unknown at most; most entries need four."""


@dataclass(frozen=True, eq=False, repr=False)
class Activation(Options, ABC):
    """Base class: `σ = prox_f` of a convex f, applied to each component (Combettes & Pesquet 2020).

    Every non-decreasing function with slopes at most 1 is one, and these are all of them in one dimension.
    """

    @abstractmethod
    def __call__(self, p: Tensor) -> Tensor:
        """`σ(p)`."""

    @abstractmethod
    def slope(self, value: Tensor) -> Tensor:
        """`σ'`, in [0, 1], where `value = σ(p)`."""

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """`prox_{αf}(p)`: the q with `q + α (σ⁻¹(q) − q) = p`. It is `σ(p)` for α = 1, or where f is an indicator."""
        return self(_preimage(self, p, step_size))


def _preimage(activation: Activation, p: Tensor, step_size: Tensor | float) -> Tensor:
    """The s with `(1 − α) σ(s) + α s = p`, a function of s whose slope is between 1 and α: `prox_{αf}(p) = σ(s)`.

    Newton's method, kept in a bracket that halves where it fails to.
    """
    alpha = step_size if isinstance(step_size, Tensor) else torch.full_like(p[:1, :1], step_size)
    s, value = p, activation(p)
    excess = (1.0 - alpha) * (value - p)
    reach = excess.abs() / alpha.clamp_max(1.0)
    low, high = p - reach, p + reach
    close = 4 * torch.finfo(p.dtype).eps
    for _ in range(_NEWTON):
        slope = (1.0 - alpha) * activation.slope(value) + alpha
        low, high = torch.where(excess < 0, s, low), torch.where(excess > 0, s, high)
        following = s - excess / slope
        inside = (following > low) & (following < high)
        following = torch.where(excess == 0, s, torch.where(inside, following, 0.5 * (low + high)))
        moved = (following - s).abs()
        s, value = following, activation(following)
        excess = (1.0 - alpha) * value + alpha * s - p
        if not bool((moved > close * s.abs()).any()):
            break
    return s


@dataclass(frozen=True, eq=False, repr=False)
class ReLU(Activation):
    """`max(p, 0)`: f is the indicator of the non-negative numbers, its prox the projection onto them for every α."""

    def __call__(self, p: Tensor) -> Tensor:
        """`max(p, 0)`."""
        return p.relu()

    def slope(self, value: Tensor) -> Tensor:
        """0 or 1."""
        return (value > 0).to(value.dtype)

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """`max(p, 0)`."""
        return p.relu()


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Activation):
    """`p` clamped to an interval, a projection too: ReLU6 is `Clamp(0, 6)`, hardtanh `Clamp(-1, 1)`."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        self._require_number("low", -math.inf)
        self._require_number("high", self.low, inside=True)

    def __call__(self, p: Tensor) -> Tensor:
        """`min(max(p, low), high)`."""
        return p.clamp(self.low, self.high)

    def slope(self, value: Tensor) -> Tensor:
        """0 or 1."""
        return ((value > self.low) & (value < self.high)).to(value.dtype)

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """The same projection."""
        return self(p)


@dataclass(frozen=True, eq=False, repr=False)
class LeakyReLU(Activation):
    """`p` where it is positive, `negative_slope · p` elsewhere."""

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        """Validate."""
        self._require_number("negative_slope", 0.0, 1.0, inside=True)

    def __call__(self, p: Tensor) -> Tensor:
        """As `torch.nn.functional.leaky_relu`."""
        return functional.leaky_relu(p, self.negative_slope)

    def slope(self, value: Tensor) -> Tensor:
        """1 or `negative_slope`."""
        return torch.where(value > 0, 1.0, self.negative_slope).to(value.dtype)

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """Where negative, q (1 + α (1/a − 1)) = p."""
        return torch.where(p > 0, p, p / (1.0 + step_size * (1.0 / self.negative_slope - 1.0)))


@dataclass(frozen=True, eq=False, repr=False)
class SoftThreshold(Activation):
    """`sign(p) max(|p| − threshold, 0)`: f is `threshold · ‖·‖₁`, and the equilibrium a sparse code."""

    threshold: float = 0.1

    def __post_init__(self) -> None:
        """Validate."""
        self._require_number("threshold", 0.0)

    def __call__(self, p: Tensor) -> Tensor:
        """As `torch.nn.functional.softshrink`."""
        return functional.softshrink(p, self.threshold)

    def slope(self, value: Tensor) -> Tensor:
        """0 or 1."""
        return (value != 0).to(value.dtype)

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """The same with `α · threshold`."""
        threshold = self.threshold * step_size
        return p.sign() * (p.abs() - threshold).relu()


@dataclass(frozen=True, eq=False, repr=False)
class Tanh(Activation):
    """`tanh(p)`."""

    def __call__(self, p: Tensor) -> Tensor:
        """`tanh(p)`."""
        return p.tanh()

    def slope(self, value: Tensor) -> Tensor:
        """`1 − value²`."""
        return 1.0 - value * value


@dataclass(frozen=True, eq=False, repr=False)
class Softsign(Activation):
    """`p/(1 + |p|)`."""

    def __call__(self, p: Tensor) -> Tensor:
        """As `torch.nn.functional.softsign`."""
        return functional.softsign(p)

    def slope(self, value: Tensor) -> Tensor:
        """`(1 − |value|)²`."""
        return (1.0 - value.abs()).square()


@dataclass(frozen=True, eq=False, repr=False)
class Sigmoid(Activation):
    """`1/(1 + exp(−p))`; its slopes are at most 1/4."""

    def __call__(self, p: Tensor) -> Tensor:
        """`1/(1 + exp(−p))`."""
        return p.sigmoid()

    def slope(self, value: Tensor) -> Tensor:
        """`value (1 − value)`."""
        return value * (1.0 - value)


@dataclass(frozen=True, eq=False, repr=False)
class Softplus(Activation):
    """`log(1 + exp(p))`, a smooth ReLU."""

    def __call__(self, p: Tensor) -> Tensor:
        """`log(1 + exp(p))`, without torch's switch to p beyond 20, which float64 would see."""
        return torch.logaddexp(p, torch.zeros_like(p))

    def slope(self, value: Tensor) -> Tensor:
        """`1 − exp(−value)`."""
        return -torch.expm1(-value)


_NAMED = {
    "relu": ReLU(),
    "relu6": Clamp(0.0, 6.0),
    "hardtanh": Clamp(-1.0, 1.0),
    "leaky_relu": LeakyReLU(),
    "soft_threshold": SoftThreshold(),
    "tanh": Tanh(),
    "softsign": Softsign(),
    "sigmoid": Sigmoid(),
    "softplus": Softplus(),
}


def activation_of(layer: str, activation: "str | Activation") -> Activation:
    """The activation of that name, or itself.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(activation, Activation):
        return activation
    if activation in _NAMED:
        return _NAMED[activation]
    raise ValueError(
        f"{layer}: activation={activation!r} is not known; {nearest(str(activation), _NAMED)} Or give an instance of "
        "torchimplicit.nn.Activation: another function need not have slopes in [0, 1]."
    )
