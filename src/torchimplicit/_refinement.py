"""Matrix products and convolutions in reduced precision for a while: what a refinement begins with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROUGH = 2.0**-8
"""Relative residual of a state that products in bfloat16 or TF32 reach."""
ROUGH_SYSTEM = 2.0**-6
"""Of a linear system, where errors add up: with something in hand."""


@contextmanager
def reduced(device: torch.device) -> Iterator[None]:
    """Within, products of float32 matrices and convolutions may be computed in less precision.

    In bfloat16 on a CPU, where oneDNN has instructions for it, in TF32 on a CUDA device; elsewhere nothing changes.
    The setting is one of the process, as torch has it.
    """
    backends: Any = torch.backends
    if device.type == "cuda":
        switches, mode = (backends.cuda.matmul, backends.cudnn.conv), "tf32"
    elif device.type == "cpu":
        switches, mode = (backends.mkldnn.matmul, backends.mkldnn.conv), "bf16"
    else:
        switches, mode = (), ""
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = mode
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
