"""Implicit layers as `torch.nn.Module`s."""

from ._equilibrium import TanhEquilibrium as TanhEquilibrium
from ._layer import FixedPoint as FixedPoint
from ._layer import Root as Root
from ._previous import Previous as Previous
