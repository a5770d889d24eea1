"""Cells whose samples are not independent, because layers in them are quantised dynamically."""

import sys
from typing import Any

from torch import nn

_DYNAMIC = "torch.ao.nn.quantized.dynamic"


def couples_samples(cell: Any) -> bool:
    """Whether a cell has a layer that scales its input by the largest entry of the whole batch, to quantise it.

    `torch.ao.quantization.quantize_dynamic` makes such layers.
    """
    if _DYNAMIC not in sys.modules or not isinstance(cell, nn.Module):
        return False
    return any(type(module).__module__.startswith(_DYNAMIC) for module in cell.modules())
