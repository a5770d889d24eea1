"""Rows against xitorch and TorchOpt, forward and gradient; and batched Newton against a loop over SciPy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.experiments.bench import peer_torch
from torchimplicit.experiments.bench.contender import Contender
from torchimplicit.experiments.bench.match import play
from torchimplicit.experiments.bench.problems import Problem, make_problem
from torchimplicit.experiments.bench.race import race
from torchimplicit.experiments.bench.row import Measurement, Row, Settings

SYSTEMS = ((10_000, 3), (1_000, 5), (100, 20))
"""How many, of how many unknowns."""
EXACT = 1e-10
"""Bound on the worst sample's `‖g(z)‖ / ‖g(0)‖` of Newton's method."""


def _implicit(peer: str, name: str, problem: str, radius: float, bar: float | None) -> Row:
    contenders: Callable[[Problem], Sequence[Contender]] = getattr(peer_torch, peer)

    def measure(settings: Settings) -> Measurement:
        drawn = make_problem(problem, radius, settings.seed)
        return play(drawn, [contenders(drawn)], settings.repeats)

    title = f"forward + gradient, our best against {peer}'s: {problem}, spectral radius {radius:g}"
    return Row(f"{name}/{problem}/{radius:g}", title, bar, measure, needs=(peer,))


def _draw_roots(batch: int, unknowns: int, seed: int) -> tuple[Tensor, Tensor]:
    """`A` and the right-hand sides of `z³ + A z = b`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(unknowns, unknowns, generator=generator, dtype=torch.float64)
    A = torch.eye(unknowns, dtype=torch.float64) + 0.5 * noise / unknowns**0.5
    return A, 3.0 * torch.randn(batch, unknowns, generator=generator, dtype=torch.float64)


def measure_newton(batch: int, unknowns: int, settings: Settings) -> Measurement:
    """Solve many systems in float64: our Newton at once, SciPy one after the other."""
    import numpy
    from scipy.optimize import root

    A, b = _draw_roots(batch, unknowns, settings.seed)
    start = torch.zeros_like(b)
    matrix, sides = A.numpy(), b.numpy()

    def g(z: Tensor, b: Tensor) -> Tensor:
        return z**3 + z @ A.T - b

    def ours() -> Tensor:
        value = ti.root(g, start, b, batch_dims=1, solver=ti.Newton(rtol=EXACT)).value
        assert isinstance(value, torch.Tensor)
        return value

    def loop(method: str) -> Tensor:
        def function(z: Any, side: Any) -> Any:
            return z**3 + matrix @ z - side

        def jacobian(z: Any, _: Any) -> Any:
            J = matrix.copy()
            J[numpy.diag_indices(unknowns)] += 3.0 * z * z
            return J

        zero = numpy.zeros(unknowns)
        found = [root(function, zero, args=(side,), jac=jacobian, method=method, tol=1e-11).x for side in sides]
        return torch.from_numpy(numpy.stack(found))

    def residual(z: Tensor) -> float:
        left = torch.linalg.vector_norm(g(z, b), dim=1) / torch.linalg.vector_norm(b, dim=1)
        return float(left.max())

    runs: dict[str, Callable[[], Tensor]] = {"ours": ours}
    runs |= {method: lambda method=method: loop(method) for method in ("hybr", "lm")}
    residuals = {name: residual(run()) for name, run in runs.items()}
    result = race(runs, settings.repeats)
    exact = [name for name in ("hybr", "lm") if residuals[name] <= EXACT]
    if not exact:
        raise RuntimeError(f"SciPy does not reach {EXACT:g}: {residuals}")
    quickest = min(exact, key=result.median)
    ratio = result.ratio("ours", quickest)
    solution = ti.root(g, start, b, batch_dims=1, solver=ti.Newton(rtol=EXACT))
    return Measurement(
        ratio.median,
        ratio.low,
        ratio.high,
        settings.repeats,
        result.median("ours"),
        result.median(quickest),
        residuals["ours"] <= EXACT,
        {
            "method": quickest,
            "residuals": residuals,
            "seconds": {name: result.median(name) for name in runs},
            "cpu_ratio": result.cpu_ratio("ours", quickest).median,
            "steps": int(solution.steps.max()),
            "evaluations": solution.evaluations,
        },
    )


def _newton(batch: int, unknowns: int) -> Row:
    return Row(
        f"scipy/newton/{batch}x{unknowns}",
        f"{batch} systems of {unknowns} unknowns: our Newton in one batch against a loop over scipy.optimize.root",
        0.1,
        lambda settings: measure_newton(batch, unknowns, settings),
        needs=("scipy",),
    )


ROWS = (
    _implicit("xitorch", "xitorch/equilibrium", "tanh-100", 0.7, 0.4),
    _implicit("xitorch", "xitorch/equilibrium", "tanh-100", 0.95, 0.4),
    _implicit("torchopt", "torchopt/custom-root", "tanh-100", 0.7, None),
    _implicit("torchopt", "torchopt/custom-root", "tanh-100", 0.95, None),
    *(_newton(*size) for size in SYSTEMS),
)
