"""Implicit layers as `torch.nn.Module`s."""

from ._activations import Activation as Activation
from ._activations import Clamp as Clamp
from ._activations import LeakyReLU as LeakyReLU
from ._activations import SoftThreshold as SoftThreshold
from ._by_sample import BySample as BySample
from ._certificate import Certificate as Certificate
from ._contractive import ContractiveConv2d as ContractiveConv2d
from ._contractive import ContractiveLinear as ContractiveLinear
from ._equilibrium import TanhEquilibrium as TanhEquilibrium
from ._graph import ImplicitGraph as ImplicitGraph
from ._infinite_graph import InfiniteGraph as InfiniteGraph
from ._infinite_graph import normalize_adjacency as normalize_adjacency
from ._layer import FixedPoint as FixedPoint
from ._layer import Root as Root
from ._lipschitz_bounded import LipschitzBounded as LipschitzBounded
from ._monotone import MonotoneLinear as MonotoneLinear
from ._monotone_conv import MonotoneConv2d as MonotoneConv2d
from ._monotone_tiers import MonotoneTiers as MonotoneTiers
from ._non_euclidean import NonEuclideanMonotone as NonEuclideanMonotone
from ._positive_concave import PositiveConcave as PositiveConcave
from ._previous import Previous as Previous
from ._qp import QP as QP
from ._qp import QPSolution as QPSolution
from ._random_start import RandomStart as RandomStart
from ._tolerance_schedule import ToleranceSchedule as ToleranceSchedule
from ._transformer import EquilibriumTransformer as EquilibriumTransformer
