"""Certificates against random instances: every inequality that a layer claims, two starts, and rough training.

    python -m benchmarks.certificates            # 1,000 instances and 1,000 optimiser steps of every layer
    python -m benchmarks.certificates --instances 50 --steps 50

Writes `benchmarks/results/certificates.json`. A ratio is what was found over what is claimed: never above 1.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti
from benchmarks.certificate_cases import STRUCTURED, Case
from benchmarks.record import RESULTS, circumstances, write

ROUNDING = 1e-9
"""What a ratio may exceed 1 by."""
CLOSE = 1e-6
"""Distance of the solutions from two starts."""
IMAGES = 6


@torch.no_grad()
def scramble(layer: Any) -> None:
    """Random parameters, some of them large: what training might make of them."""
    for parameter in layer.parameters():
        size = 10.0 ** (2.0 * torch.rand(()) - 1.5) if parameter.ndim > 1 else 0.5
        parameter.copy_(size * torch.randn_like(parameter))


@torch.no_grad()
def findings(layer: Any, x: Tensor) -> dict[str, float]:
    """The ratios of one instance, the distance of two starts, and whether all converged."""
    sized = isinstance(layer, ti.nn.MonotoneConv2d | ti.nn.MonotoneTiers)
    certificate = layer.certificate((IMAGES, IMAGES)) if sized else layer.certificate()
    assert certificate.well_posed
    map_, (c,) = layer._bound(x)
    n = c[0].numel()
    start, matrix = torch.zeros_like(c), _matrix(map_, c)
    injection = _linear(layer.injection, x)
    found = {"condition": _condition(layer, certificate, map_, matrix)}
    if certificate.lipschitz is not None:
        slopes = (torch.rand(8, n) < 0.6).to(x.dtype)
        through = torch.linalg.solve(
            torch.eye(n) - slopes[:, :, None] * matrix, slopes[:, :, None] * _grown(layer, injection, n)
        )
        if hasattr(layer, "readout"):
            through = layer.readout.weight @ through
        order = float("inf") if certificate.norm.endswith(("inf", "inf)")) else 2
        found["lipschitz"] = float(torch.linalg.matrix_norm(through, order).max()) / certificate.lipschitz
    positive = isinstance(layer, ti.nn.PositiveConcave)
    layer.init = lambda x: start
    one = layer.solve(x)
    layer.init = lambda x: 3.0 * (torch.rand_like(start) if positive else torch.randn_like(start))
    other = layer.solve(x)
    layer.init = None
    pairs = zip(_tensors(one.value), _tensors(other.value), strict=True)
    scale = max(float(t.abs().max()) for t in _tensors(one.value))
    found["starts"] = max(float((a - b).abs().max()) for a, b in pairs) / max(1.0, scale)
    found["failures"] = float((~one.converged).sum() + (~other.converged).sum())
    return found


def _condition(layer: Any, certificate: ti.nn.Certificate, map_: Any, matrix: Tensor) -> float:
    """What is claimed of W, or of the map, over what is found."""
    identity = torch.eye(len(matrix))
    if isinstance(layer, ti.nn.ContractiveLinear | ti.nn.ContractiveConv2d):
        assert certificate.factor is not None
        order = 2 if layer.norm == "2" else float("inf")
        bound = max(certificate.factor, 1e-30)
        return float(torch.linalg.matrix_norm(matrix, order)) / bound * max(1.0, certificate.factor / layer.contraction)
    if isinstance(layer, ti.nn.NonEuclideanMonotone):
        scaling, slopes = layer.scaling, torch.rand(16, len(matrix))
        method: Any = layer._method(map_)
        alpha = method.damping
        averaged = (1 - alpha) * identity + alpha * slopes[:, :, None] * matrix
        norm = (scaling[:, None] * averaged / scaling).abs().sum(2).max()
        return float(norm) / float(certificate.factor or 0.0)
    if isinstance(layer, ti.nn.PositiveConcave):
        a, b = (torch.rand(16, len(matrix)) * 10.0 ** (torch.rand(16, 1) * 4 - 2) for _ in range(2))
        s = layer.floor + torch.rand(16, len(matrix))
        before, after = (a.log() - b.log()).abs().amax(1), (map_(a, s).log() - map_(b, s).log()).abs().amax(1)
        return float((after / before).max()) / float(certificate.factor or 0.0)
    operator = map_.operator
    metric = getattr(operator, "metric", None)
    root = torch.ones(len(matrix)) if metric is None else metric.sqrt()
    shifted = root[:, None] * (identity - matrix) / root
    least = float(torch.linalg.eigvalsh(0.5 * (shifted + shifted.mT))[0])
    # Peaceman and Rachford's u contracts by ‖2V − I‖, and by less where only a part ρ of a step is taken.
    alpha, rho = ti.linear.resolvent_step(operator), ti.linear.RELAXATION
    reflected = 2 * rho * torch.linalg.inv(identity + alpha * shifted) + (1 - 2 * rho) * identity
    factor = float(torch.linalg.matrix_norm(reflected, 2)) / float(certificate.factor or 0.0)
    norm = float(torch.linalg.matrix_norm(shifted, 2)) / operator.norm_bound()
    return max(operator.margin / least, factor, norm)


def _matrix(map_: Any, c: Tensor) -> Tensor:
    """W, `(n, n)`."""
    if hasattr(map_, "operator"):
        return map_.operator.dense()
    n, shape = c[0].numel(), c.shape[1:]
    units = torch.eye(n).reshape(n, *shape)
    return torch.nn.functional.conv2d(units, map_.kernel, padding=map_.kernel.shape[-1] // 2).reshape(n, n).mT


def _linear(injection: Any, x: Tensor) -> Tensor:
    """U, `(outputs, inputs)`."""
    m = x[0].numel()
    units = torch.eye(m).reshape(m, *x.shape[1:])
    return (injection(units) - injection(torch.zeros_like(units))).reshape(m, -1).mT


def _grown(layer: Any, injection: Tensor, n: int) -> Tensor:
    """U on all unknowns: it reaches the first tier only."""
    return torch.cat((injection, injection.new_zeros(n - len(injection), injection.shape[1])))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _rows(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3),)


def _images(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 1, IMAGES, IMAGES),)


CASES = {
    "ContractiveLinear": Case(lambda: ti.nn.ContractiveLinear(3, 6), _rows, findings),
    "ContractiveLinear-inf": Case(lambda: ti.nn.ContractiveLinear(3, 6, norm="inf"), _rows, findings),
    "ContractiveConv2d": Case(lambda: ti.nn.ContractiveConv2d(1, 2), _images, findings),
    "ContractiveConv2d-inf": Case(lambda: ti.nn.ContractiveConv2d(1, 2, norm="inf"), _images, findings),
    "MonotoneLinear": Case(lambda: ti.nn.MonotoneLinear(3, 6), _rows, findings),
    "MonotoneLinear-tanh": Case(lambda: ti.nn.MonotoneLinear(3, 6, activation="tanh"), _rows, findings),
    "MonotoneConv2d": Case(lambda: ti.nn.MonotoneConv2d(1, 2, padding=1), _images, findings),
    "MonotoneTiers": Case(lambda: ti.nn.MonotoneTiers(1, (2, 2), 1), _images, findings),
    "LipschitzBounded": Case(lambda: ti.nn.LipschitzBounded(3, 6, 2), _rows, findings),
    "NonEuclideanMonotone": Case(lambda: ti.nn.NonEuclideanMonotone(3, 6), _rows, findings),
    "PositiveConcave": Case(lambda: ti.nn.PositiveConcave(3, 6), _rows, findings),
    **STRUCTURED,
}


def instances(case: Case, count: int, seed: int = 0) -> dict[str, float]:
    """The worst finding of so many random instances."""
    torch.manual_seed(seed)
    worst: dict[str, float] = {}
    for _ in range(count):
        layer = case.make()
        scramble(layer)
        for name, value in case.findings(layer, *case.inputs(4)).items():
            worst[name] = value + worst.get(name, 0.0) if name == "failures" else max(value, worst.get(name, 0.0))
    return worst


def trained(case: Case, steps: int, rate: float = 0.3, seed: int = 0) -> dict[str, float]:
    """The findings after optimiser steps with a large learning rate, on a loss that wants a long way to go."""
    torch.manual_seed(seed)
    layer = case.make()
    optimiser = torch.optim.Adam(layer.parameters(), lr=rate)
    x = case.inputs(4)
    for _ in range(steps):
        loss = sum(
            (z.flatten(1).sum(1) - 5.0 * torch.sin(3.0 * x[0].flatten(1).sum(1))).square().mean()
            for z in _tensors(layer(*x))
        )
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return case.findings(layer, *x)


def holds(found: dict[str, float]) -> bool:
    """Whether no claim is exceeded by more than rounding, two starts end alike, and all samples converge."""
    within = all(found.get(claim, 0.0) <= 1 + ROUNDING for claim in ("condition", "lipschitz"))
    return within and found["starts"] <= CLOSE and not found["failures"]


def main() -> int:
    """All layers; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS / "certificates.json")
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    layers: dict[str, Any] = {}
    for name in chosen.layers:
        begun = time.process_time()
        one = instances(CASES[name], chosen.instances)
        two = trained(CASES[name], chosen.steps)
        layers[name] = {"instances": one, "trained": two, "holds": holds(one) and holds(two)}
        print(f"{name}: {one} trained: {two} ({time.process_time() - begun:.0f} s)", flush=True)
        facts = {"instances": chosen.instances, "steps": chosen.steps, "layers": layers}
        write(chosen.out, circumstances("benchmarks.certificates", sys.argv[1:]) | facts)
    return int(not all(layer["holds"] for layer in layers.values()))


if __name__ == "__main__":
    sys.exit(main())
