"""The QP layer beside cvxpylayers: 200 random programs, solutions, gradients and time, both sides verified.

    pip install torchimplicit[bench]; OMP_NUM_THREADS=1 python -m benchmarks.qp_layer

Every program is strongly convex with n = m = 50 and a feasible point; the gradient is that of a random linear function
of z with respect to Q, p, G and h. Times are of the process, one thread, medians of interleaved repetitions.

The peer is measured as it comes; with SCS at the loosest tolerance that suffices for 1e-6, its derivative dense and its
pool of threads off, the fastest of its settings that is as accurate as ours; and, where `pip install moreau` was run,
with the engine of that name, for which no setting was found that reaches 1e-6.
"""

# pyright: reportMissingImports=false

import json
import statistics
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import cvxpy
import torch
from cvxpylayers.torch import CvxpyLayer  # pyright: ignore
from torch import Tensor

import torchimplicit as ti

N, M, BATCH, REPEATS = 50, 50, 200, 9
PACKAGES = ("torch", "cvxpylayers", "cvxpy", "diffcp", "scs", "clarabel", "moreau")
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


def peer(solver: str | None = None) -> CvxpyLayer:
    """The same program for cvxpylayers."""
    z = cvxpy.Variable(N)
    root, p, G, h = (cvxpy.Parameter(s) for s in ((N, N), (N,), (M, N), (M,)))
    problem = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ z) + p @ z), [G @ z <= h])
    return CvxpyLayer(problem, parameters=[root, p, G, h], variables=[z], solver=solver)


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
    accurate = {"solve_method": "SCS", "eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 100_000, "mode": "dense"}
    serial = {"n_jobs_forward": 1, "n_jobs_backward": 1}
    sides = {
        "ours": ours,
        "cvxpylayers": lambda *d: layer(*d)[0],
        "cvxpylayers, SCS at 1e-8, dense, one job": lambda *d: layer(*d, solver_args={**accurate, **serial})[0],
    }
    if find_spec("moreau"):
        moreau = peer(solver="MOREAU")
        sides["cvxpylayers, Moreau"] = lambda *d: moreau(*d)[0]
    found: dict[str, dict] = {name: {"forward": [], "backward": []} for name in sides}
    for repeat in range(-1, REPEATS):
        for name, call in sides.items():
            inputs = [t.clone().requires_grad_() for t in data]
            began = time.process_time()
            z = call(*inputs)
            middle = time.process_time()
            (weight * z).sum().backward()
            ended = time.process_time()
            if repeat < 0:
                continue  # the first of each is for whatever is set up once
            found[name]["forward"].append(middle - began)
            found[name]["backward"].append(ended - middle)
            found[name]["values"] = [z.detach(), *(t.grad for t in inputs)]
    exact = found["ours"]["values"]
    result: dict = {
        "programs": BATCH,
        "n": N,
        "m": M,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "repetitions": REPEATS,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.qp_layer",
    }
    for name, side in found.items():
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(side["values"], exact, strict=True)]
        result[name] = {
            "forward_s": statistics.median(side["forward"]),
            "backward_s": statistics.median(side["backward"]),
            "largest_difference_from_ours": dict(zip(("z", "root", "p", "G", "h"), differences, strict=True)),
        }
    result["gradient_against_finite_differences"] = differences_along(data, weight, found)
    totals = {name: [a + b for a, b in zip(s["forward"], s["backward"], strict=True)] for name, s in found.items()}
    result["times_faster"] = {
        name: {
            "median": statistics.median(total) / statistics.median(totals["ours"]),
            "smallest": min(theirs / mine for theirs, mine in zip(total, totals["ours"], strict=True)),
        }
        for name, total in totals.items()
        if name != "ours"
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
