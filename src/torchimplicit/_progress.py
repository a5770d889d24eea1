"""The live view of a solve: a line for every step."""

import sys

import torch
from torch import Tensor

_QUANTILES = (0.5, 0.9, 1.0)


class Progress:
    """Prints how the residuals of a batch fall, to standard error; what `verbose=True` asks for.

    Args:
        what: the call, for the first line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps = 0

    def step(self, solver: object, norm: Tensor, left: int) -> None:
        """After a step: the residual norms of all samples, `(B,)`, and how many samples are unsolved."""
        if not self._steps:
            print(f"{self._what}: {norm.numel()} samples", file=sys.stderr)
            print("  step  solver                 median      90 %       max  converged", file=sys.stderr)
        self._steps += 1
        finite = norm[norm.isfinite()].double()
        if finite.numel():
            quantiles = torch.quantile(finite, finite.new_tensor(_QUANTILES)).tolist()
        else:
            quantiles = [float("nan")] * len(_QUANTILES)
        lost = norm.numel() - finite.numel()
        figures = " ".join(f"{q:9.2e}" for q in quantiles)
        share = 100 * (norm.numel() - left) / max(norm.numel(), 1)
        note = f"  ({lost} not finite)" if lost else ""
        print(f"{self._steps:6d}  {type(solver).__name__:<20} {figures} {share:8.1f} %{note}", file=sys.stderr)
