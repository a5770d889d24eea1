"""Reduced precision that a refinement begins with: which one, and how far it goes."""

import math
from typing import Any

import torch

ROUGH = 2.0**-8
"""Relative residual of a state that an evaluation in bfloat16 reaches."""
ROUGH_SYSTEM = 2.0**-6
"""Of a linear system, where errors add up: with something in hand."""
WORTH = 0.5
"""Factor by which a refinement must make the residual fall to be worth another."""

_RATE = 0.7
"""What a product is taken to make of the residual where nothing is known of it."""
_FEWEST, _MOST = 3, 12


class Pace:
    """How many products a system needs, by what those before it needed: when it is worth looking at the norms."""

    def __init__(self) -> None:
        self._rate = _RATE

    def products(self, factor: float) -> int:
        """Products until the residual has fallen to a factor of itself, about."""
        factor = min(max(factor, ROUGH_SYSTEM), 0.99)
        return min(max(math.ceil(1.1 * math.log(factor) / math.log(self._rate)), _FEWEST), _MOST)

    def note(self, factor: float, products: int) -> None:
        """What the residual has fallen to with so many products."""
        if products and 0.0 < factor < 1.0:
            self._rate = min(max(factor ** (1 / products), 0.05), 0.95)


def coarse_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies matrices of it faster than those of float32, else None."""
    cpu: Any = torch.cpu
    if device.type == "cpu":
        fast = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = False
    return torch.bfloat16 if fast else None
