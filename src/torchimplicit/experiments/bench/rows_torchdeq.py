"""Forward and backward against TorchDEQ, at equal verified residual and gradient error; both at their best settings."""

from torchimplicit.experiments.bench import ours, peer_torchdeq
from torchimplicit.experiments.bench.match import play
from torchimplicit.experiments.bench.problems import make_problem
from torchimplicit.experiments.bench.row import Measurement, Row, Settings

BAR, MEDIAN_BAR = 0.40, 0.25
SOLVERS = ("picard", "anderson", "broyden")
PROBLEMS = ("tanh-100", "tanh-1000", "conv")
RADII = (0.7, 0.95)


def measure(solver: str, problem_name: str, radius: float, settings: Settings) -> Measurement:
    """Our best, and our solver of the same name, against TorchDEQ's solver of that name.

    `TanhEquilibrium` may stand for ours where the cell is its cell; the evidence has the plain cell's ratio as well.
    Where TorchDEQ's own solver does not get the adjoint within the bound, it is lent another for the backward pass.
    """
    problem = make_problem(problem_name, radius, settings.seed)
    lent = [other for other in SOLVERS if other != solver]
    groups = [peer_torchdeq.torchdeq(problem, solver), *(peer_torchdeq.torchdeq(problem, solver, b) for b in lent)]
    same = ours.same_name(problem, solver)
    return play(problem, groups, settings.repeats, same, curves=not settings.quick, layer=True)


def _row(solver: str, problem: str, radius: float) -> Row:
    return Row(
        f"torchdeq/{solver}/{problem}/{radius:g}",
        f"forward + backward, our best against TorchDEQ's {solver}: {problem}, spectral radius {radius:g}",
        BAR,
        lambda settings: measure(solver, problem, radius, settings),
        needs=("torchdeq",),
    )


ROWS = tuple(_row(solver, problem, radius) for solver in SOLVERS for problem in PROBLEMS for radius in RADII)
