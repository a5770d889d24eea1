"""The QP layer beside cvxpylayers: 200 random programs, solutions, gradients and time, both sides verified.

    pip install cvxpylayers; python -m benchmarks.qp_layer

Every program is strongly convex with n = m = 50 and a feasible point; the gradient is that of a random linear function
of z with respect to Q, p, G and h. Times are of the process, one thread, median of five interleaved repetitions.
"""

# pyright: reportMissingImports=false

import json
import statistics
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cvxpy
import torch
from cvxpylayers.torch import CvxpyLayer  # pyright: ignore
from torch import Tensor

import torchimplicit as ti

N, M, BATCH, REPEATS = 50, 50, 200, 5
OUT = Path(__file__).parent / "results" / "qp_layer.json"


def programs() -> list[Tensor]:
    """A factor L of Q, p, G and h."""
    torch.manual_seed(0)
    L = torch.randn(BATCH, N, N, dtype=torch.float64)
    z = torch.randn(BATCH, N, 1, dtype=torch.float64)
    G = torch.randn(BATCH, M, N, dtype=torch.float64)
    h = (G @ z)[..., 0] + torch.rand(BATCH, M, dtype=torch.float64)
    Q = L @ L.mT / N + 0.1 * torch.eye(N, dtype=torch.float64)
    # The peer's problem is written with a square root of Q, as its grammar demands.
    return [torch.linalg.cholesky(Q).mT.contiguous(), torch.randn(BATCH, N, dtype=torch.float64), G, h]


def ours(root: Tensor, p: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """The minimisers."""
    return ti.nn.QP()(root.mT @ root, p, G, h)


def peer() -> CvxpyLayer:
    """The same program for cvxpylayers."""
    z = cvxpy.Variable(N)
    root, p, G, h = (cvxpy.Parameter(s) for s in ((N, N), (N,), (M, N), (M,)))
    problem = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ z) + p @ z), [G @ z <= h])
    return CvxpyLayer(problem, parameters=[root, p, G, h], variables=[z])


def differences_along(data: list[Tensor], weight: Tensor, found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """How far each side's derivative along a random change of p is from central differences, relative to its scale."""
    change, step = torch.randn(BATCH, N, dtype=torch.float64), 1e-7
    root, p, G, h = data
    ends = [(weight * ours(root, p + sign * step * change, G, h)).sum(1) for sign in (1, -1)]
    exact = (ends[0] - ends[1]) / (2 * step)
    scale = exact.abs().median()
    errors = {name: ((side["values"][2] * change).sum(1) - exact).abs() / scale for name, side in found.items()}
    return {name: {"median": float(e.median()), "largest": float(e.max())} for name, e in errors.items()}


def main() -> None:
    """Measure and write the figures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data, weight = programs(), torch.randn(BATCH, N, dtype=torch.float64)
    layer = peer()
    precise = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000}
    # Clarabel, its default, has no such options; what each reaches is reported.
    sides = {
        "ours": lambda *d: ours(*d),
        "cvxpylayers": lambda *d: layer(*d)[0],
        "cvxpylayers, SCS at 1e-9, dense": lambda *d: layer(
            *d, solver_args={"solve_method": "SCS", "mode": "dense", **precise}
        )[0],
    }
    found: dict[str, dict] = {name: {"forward": [], "backward": []} for name in sides}
    for repeat in range(REPEATS):
        for name, call in sides.items():
            if "SCS" in name and repeat:
                continue
            inputs = [t.clone().requires_grad_() for t in data]
            began = time.process_time()
            z = call(*inputs)
            middle = time.process_time()
            (weight * z).sum().backward()
            ended = time.process_time()
            found[name]["forward"].append(middle - began)
            found[name]["backward"].append(ended - middle)
            found[name]["values"] = [z.detach(), *(t.grad for t in inputs)]
    exact = found["ours"]["values"]
    result: dict = {
        "programs": BATCH,
        "n": N,
        "m": M,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "cvxpylayers", "cvxpy", "diffcp", "scs", "clarabel")},
        "command": "python -m benchmarks.qp_layer",
    }
    for name, side in found.items():
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(side["values"], exact, strict=True)]
        result[name] = {
            "forward_s": statistics.median(side["forward"]),
            "backward_s": statistics.median(side["backward"]),
            "largest_difference_from_ours": dict(zip(("z", "root", "p", "G", "h"), differences, strict=True)),
        }
    result["gradient_against_finite_differences"] = differences_along(data, weight, found)
    total = {name: result[name]["forward_s"] + result[name]["backward_s"] for name in found}
    result["times_faster"] = {name: total[name] / total["ours"] for name in found if name != "ours"}
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
