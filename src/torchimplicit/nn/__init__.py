"""Implicit layers as `torch.nn.Module`s."""

from ._by_sample import BySample as BySample
from ._equilibrium import TanhEquilibrium as TanhEquilibrium
from ._layer import FixedPoint as FixedPoint
from ._layer import Root as Root
from ._previous import Previous as Previous
from ._random_start import RandomStart as RandomStart
from ._tolerance_schedule import ToleranceSchedule as ToleranceSchedule
