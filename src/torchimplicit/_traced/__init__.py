"""A solve as a part of one graph, for `torch.compile`, `torch.export` and ONNX: no value is looked at by Python."""

from ._call import reason_against as reason_against
from ._call import run_traced as run_traced
