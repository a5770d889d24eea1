"""Forward and gradient against optimistix + lineax and against jaxopt, compiled; at equal verified accuracy."""

from collections.abc import Callable, Sequence

from torchimplicit.experiments.bench import peer_jax
from torchimplicit.experiments.bench.contender import Contender
from torchimplicit.experiments.bench.match import play
from torchimplicit.experiments.bench.problems import Problem, make_problem
from torchimplicit.experiments.bench.row import Measurement, Row, Settings

BAR = 0.8
PEERS: dict[str, tuple[Callable[[Problem], Sequence[Contender]], tuple[str, ...]]] = {
    "optimistix": (peer_jax.optimistix, ("jax", "optimistix", "lineax")),
    "jaxopt": (peer_jax.jaxopt, ("jax", "jaxopt")),
}


def measure(peer: str, problem_name: str, radius: float, settings: Settings) -> Measurement:
    """Our best against the peer's best under jit, both warm: `TanhEquilibrium` is ours, compiled if that is quicker."""
    problem = make_problem(problem_name, radius, settings.seed)
    return play(problem, [PEERS[peer][0](problem)], settings.repeats, layer=True)


def _row(peer: str, problem: str, radius: float) -> Row:
    return Row(
        f"jax/{peer}/{problem}/{radius:g}",
        f"forward + gradient, our best against {peer} under jit: {problem}, spectral radius {radius:g}",
        BAR,
        lambda settings: measure(peer, problem, radius, settings),
        needs=PEERS[peer][1],
    )


ROWS = tuple(
    _row(peer, problem, radius) for peer in PEERS for problem in ("tanh-100", "tanh-1000") for radius in (0.7, 0.95)
)
