"""What solvers promise: truthful residuals, samples decided one by one, safeguards, and counts that are counts."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchimplicit as ti
from tests.problems import TanhProblem

DOUBLE = torch.float64
ALL = {
    "picard": ti.Picard(),
    "anderson": ti.Anderson(),
    "newton": ti.Newton(),
    "newton_gmres": ti.Newton(linear_solver=ti.GMRES()),
    "newton_cascade": ti.Newton(linear_solver=ti.Cascade(small=0)),
    "newton_krylov": ti.NewtonKrylov(),
    "newton_bicgstab": ti.NewtonKrylov(linear_solver=ti.BiCGStab()),
    "chord": ti.Chord(),
    "broyden": ti.Broyden(update="good"),
    "broyden_bad": ti.Broyden(update="bad"),
    "dogleg": ti.Dogleg(),
    "levenberg_marquardt": ti.LevenbergMarquardt(),
    "levenberg_marquardt_cg": ti.LevenbergMarquardt(linear_solver="cg"),
    "auto": ti.Auto(),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())


@EVERY_SOLVER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["rms", "two", "max"])
def test_converged_means_that_the_recomputed_residual_is_within_the_tolerance(
    solver: ti.solvers.Solver, dtype: torch.dtype, norm: str
) -> None:
    p = TanhProblem.make(batch=16, n=12, contraction=0.9, dtype=dtype)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    solver = type(solver)(**{**vars(solver), "rtol": rtol, "atol": 0.0, "norm": norm})
    sol = ti.fixed_point(p.map, p.start, solver=solver, batch_dims=1)
    value = p.map(sol.value).detach()
    functions = {
        "rms": lambda r: r.square().mean(1).sqrt(),
        "two": lambda r: r.norm(dim=1),
        "max": lambda r: r.abs().amax(1),
    }
    residual, scale = functions[norm](value - sol.value.detach()), functions[norm](value)
    assert sol.converged.all()
    torch.testing.assert_close(sol.residual, residual, rtol=1e-3, atol=10 * torch.finfo(dtype).eps)
    assert (sol.residual <= rtol * scale * (1 + 1e-6)).all()


@EVERY_SOLVER
def test_trace_steps_and_evaluations_are_what_happened(solver: ti.solvers.Solver) -> None:
    p = TanhProblem.make(batch=5, n=4)
    calls = 0

    def fn(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return p.map(z)

    with torch.no_grad():
        sol = ti.fixed_point(fn, p.start, solver=solver, batch_dims=1, trace=True)
    assert sol.trace is not None
    assert sol.trace.shape == (int(sol.steps.max()), 5)
    torch.testing.assert_close(sol.trace[-1], sol.residual)
    if isinstance(solver, ti.Picard | ti.Anderson | ti.Broyden | ti.Auto):
        assert sol.evaluations == calls == int(sol.steps.max()) + 1
    else:
        assert sol.evaluations >= calls
    for sample, steps in enumerate(sol.steps.tolist()):
        history = sol.trace[:, sample]
        assert (history[steps - 1 :] == history[steps - 1]).all()  # frozen from there on
        assert steps == 1 or history[steps - 2] > sol.residual[sample]


def test_steps_of_picard_are_those_of_the_definition() -> None:
    """z ← z/2 + 1 from 0: residual 2^{-k}; each sample stops at its own tolerance's step."""
    sol = ti.fixed_point(
        lambda z: torch.tensor([[0.5], [0.25]], dtype=DOUBLE) * z + 1,
        torch.zeros(2, 1, dtype=DOUBLE),
        solver=ti.Picard(rtol=0.0, atol=2.0**-10),
        batch_dims=1,
    )
    assert sol.steps.tolist() == [10, 5]
    assert sol.residual.tolist() == [2.0**-10, 4.0**-5]


@EVERY_SOLVER
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_sample_gets_the_same_answer_alone_and_in_any_batch(solver: ti.solvers.Solver, data: st.DataObject) -> None:
    n = 6
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    weight *= data.draw(st.sampled_from([0.3, 0.8, 0.95])) / torch.linalg.matrix_norm(weight, 2)
    size = data.draw(st.integers(1, 7))
    x = torch.randn(size, n, generator=generator, dtype=DOUBLE) * 10 ** torch.randn(
        size, 1, generator=generator, dtype=DOUBLE
    )
    if data.draw(st.booleans()):
        x[data.draw(st.integers(0, size - 1))] = torch.nan  # a poisoned neighbour
    solver = type(solver)(**{**vars(solver), "rtol": 1e-13})

    def solve(x: Tensor) -> ti.Solution:
        return ti.fixed_point(
            lambda z: torch.tanh(z @ weight.T + x),
            torch.zeros_like(x),
            solver=solver,
            batch_dims=1,
            on_failure="ignore",
        )

    together = solve(x)
    for i in range(size):
        alone = solve(x[i : i + 1])
        assert together.status[i] == alone.status[0]
        torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-12, atol=1e-12)
        if not x[i].isnan().any():
            assert alone.converged.all()


def test_batch_dims_zero_solves_one_coupled_problem() -> None:
    coupling = 0.4 * torch.randn(6, 6, dtype=DOUBLE) / 6**0.5
    x = torch.randn(6, 1, dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: torch.tanh(coupling @ z + x), torch.zeros_like(x), solver=ti.Newton())
    assert sol.status.shape == () and sol.converged
    torch.testing.assert_close(torch.tanh(coupling @ sol.value + x), sol.value)


@pytest.mark.parametrize("damping", [0.2, 0.45])
def test_damping_cures_a_map_that_is_no_contraction(damping: float) -> None:
    """Eigenvalue −3 of J: damped by η the factor is |1 − 4η|."""
    sol = ti.fixed_point(lambda z: 4.0 - 3.0 * z, torch.zeros(1, dtype=DOUBLE), solver=ti.Picard(damping=damping))
    assert sol.converged and sol.value.item() == pytest.approx(1.0, abs=1e-9)
    plain = ti.fixed_point(
        lambda z: 4.0 - 3.0 * z, torch.zeros(1, dtype=DOUBLE), solver=ti.Picard(), on_failure="ignore"
    )
    assert plain.status.item() == ti.Status.DIVERGED


def test_damping_with_patience_finds_what_each_sample_needs() -> None:
    """Slopes 0.5, −3 and −9: the factor 1 − η(1 − J) is below 1 in size for η = 1, below 1/2 and below 1/5."""
    slope = torch.tensor([[0.5], [-3.0], [-9.0]], dtype=DOUBLE)

    def solve(slope: Tensor) -> ti.Solution:
        solver = ti.Picard(damping_patience=3)
        return ti.fixed_point(
            lambda z, slope: slope * z + 1, torch.zeros_like(slope), slope, solver=solver, batch_dims=1
        )

    together = solve(slope)
    assert together.converged.all()
    torch.testing.assert_close(together.value, 1 / (1 - slope), rtol=1e-9, atol=0)
    plain = ti.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1, dtype=DOUBLE), solver=ti.Picard(), batch_dims=1)
    assert together.steps[0] == plain.steps[0]
    for i in range(3):
        assert solve(slope[i : i + 1]).steps.item() == together.steps[i].item()


@pytest.mark.parametrize("contraction", [0.9, 0.97])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_anderson_does_not_stall_whatever_the_units(contraction: float, scale: float) -> None:
    """float32 down to 10 ε relative, in a third of Picard's evaluations; an absolute ridge stalls at 1e-5."""
    torch.manual_seed(0)
    n = 50
    q = torch.linalg.qr(torch.randn(n, n))[0]
    matrix = q @ torch.diag(torch.linspace(-contraction, contraction, n)) @ q.T
    x = scale * torch.randn(8, n)
    tight = 10 * torch.finfo(torch.float32).eps
    runs = {}
    for solver in (ti.Anderson(rtol=tight, history=8), ti.Picard(rtol=1e-5)):
        runs[type(solver).__name__] = ti.fixed_point(
            lambda z: z @ matrix + x, torch.zeros_like(x), solver=solver, batch_dims=1, max_steps=2000
        )
    assert runs["Anderson"].converged.all() and runs["Picard"].converged.all()
    assert 3 * runs["Anderson"].evaluations < 2 * runs["Picard"].evaluations


def test_anderson_survives_a_history_of_dependent_differences() -> None:
    """n = 1 with five columns, and a sample whose residual becomes exactly constant: singular Gram matrices."""
    x = torch.tensor([[1.0], [0.0], [5.0]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: 0.9 * z + x, torch.zeros_like(x), solver=ti.Anderson(history=5), batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 10 * x)
    plane = torch.tensor([[0.0, -0.99], [0.99, 0.0]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: z @ plane + 1, torch.zeros(3, 2, dtype=DOUBLE), solver=ti.Anderson(), batch_dims=1)
    assert sol.converged.all() and int(sol.steps.max()) <= 6


def test_anderson_recovers_from_a_step_into_a_hole_of_the_domain() -> None:
    """log is NaN where acceleration overshoots to; the safeguard goes back and takes a plain step."""
    a = torch.linspace(0.5, 6.0, 12, dtype=DOUBLE)[:, None]
    sol = ti.fixed_point(lambda z: a * torch.log(2.0 + z), torch.full_like(a, 1e-3), solver=ti.Anderson(), batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(a * torch.log(2.0 + sol.value), sol.value)


def test_newton_converges_quadratically_and_line_search_saves_a_far_start() -> None:
    z0 = torch.tensor([[3.0]], dtype=DOUBLE)
    far = ti.root(torch.atan, z0, solver=ti.Newton(), batch_dims=1, trace=True)
    assert far.converged.all() and abs(far.value.item()) < 1e-9
    plain = ti.root(torch.atan, z0, solver=ti.Newton(max_backtracks=0), batch_dims=1, on_failure="ignore")
    assert not plain.converged.any()  # plain Newton diverges from |z| > 1.39
    near = ti.root(lambda z: z**2 - 2, torch.tensor([[1.5]], dtype=DOUBLE), batch_dims=1, trace=True)
    assert near.trace is not None and near.steps.item() <= 4
    errors = near.trace[:, 0].tolist()
    assert errors[1] < 2 * errors[0] ** 2


def test_newton_reaches_the_rounding_of_a_start_that_is_already_the_root() -> None:
    z0 = torch.tensor([[2.0**0.5], [3.0**0.5]], dtype=DOUBLE)
    a = torch.tensor([[2.0], [3.0]], dtype=DOUBLE)
    sol = ti.root(lambda z: z**2 - a, z0, batch_dims=1)
    assert sol.converged.all() and (sol.residual < 1e-15).all()
    tiny = ti.root(lambda z: 1e-30 * (z**2 - a), torch.ones_like(a), batch_dims=1)  # units of F do not matter
    torch.testing.assert_close(tiny.value, a.sqrt())


@pytest.mark.parametrize("units", [1e-20, 1.0, 1e20])
@EVERY_SOLVER
def test_units_of_the_state_do_not_matter(solver: ti.solvers.Solver, units: float) -> None:
    x = units * torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x), solver=solver, batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 2 * x, rtol=1e-9, atol=0.0)


def test_fixed_point_at_zero_is_reached_from_elsewhere() -> None:
    for solver in ALL.values():
        sol = ti.fixed_point(lambda z: 0.5 * torch.sin(z), torch.ones(2, 1, dtype=DOUBLE), solver=solver, batch_dims=1)
        assert sol.converged.all() and (sol.value.abs() < 1e-9).all(), solver


@pytest.mark.parametrize("every", [2, 3, 7])
def test_check_every_only_delays_decisions(every: int) -> None:
    p = TanhProblem.make(batch=6, n=5)
    once = ti.fixed_point(p.map, p.start, solver=ti.Picard(), batch_dims=1)
    seldom = ti.fixed_point(p.map, p.start, solver=ti.Picard(check_every=every), batch_dims=1)
    assert seldom.converged.all()
    late = seldom.steps - once.steps
    assert ((late >= 0) & (late < every)).all() and (seldom.steps % every == 0).all()


def test_step_limit_zero_evaluates_once_and_returns_the_start() -> None:
    x = torch.tensor([[1.0], [0.0]], dtype=DOUBLE)
    sol = ti.fixed_point(
        lambda z: 0.5 * z + x, torch.zeros_like(x), batch_dims=1, max_steps=0, on_failure="ignore", trace=True
    )
    assert sol.status.tolist() == [ti.Status.MAX_STEPS, ti.Status.CONVERGED]
    assert sol.trace is not None and sol.trace.shape == (0, 2)
    assert torch.equal(sol.value, torch.zeros_like(x))


@pytest.mark.parametrize("name", [name for name in ALL if name != "auto"])  # which looks at every other iterate
def test_best_iterate_is_returned_when_the_steps_run_out(name: str) -> None:
    """A map whose residual rises again: the value returned has the smallest residual seen."""
    solver = ALL[name]
    plane = 1.2 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    kick = torch.tensor([[1.0, 0.5]], dtype=DOUBLE)
    sol = ti.fixed_point(
        lambda z: torch.sin(3 * z) @ plane + kick,
        torch.zeros(1, 2, dtype=DOUBLE),
        solver=type(solver)(**{**vars(solver), "rtol": 1e-15, "atol": 0.0}),
        batch_dims=1,
        max_steps=7,
        on_failure="ignore",
        trace=True,
    )
    assert sol.trace is not None
    first = kick.square().mean().sqrt()
    assert sol.residual.item() == pytest.approx(min(sol.trace.min().item(), first.item()), rel=1e-9)
    value = torch.sin(3 * sol.value) @ plane + kick - sol.value
    assert value.square().mean().sqrt().item() == pytest.approx(sol.residual.item(), rel=1e-6)


@EVERY_SOLVER
def test_empty_batches_and_empty_states(solver: ti.solvers.Solver) -> None:
    for shape in ((0, 3), (3, 0), (0, 0)):
        z0 = torch.zeros(shape, requires_grad=True)
        sol = ti.fixed_point(lambda z: 0.5 * z, z0, solver=solver, batch_dims=1)
        assert sol.value.shape == shape and sol.converged.all() and sol.status.shape == shape[:1]


@EVERY_SOLVER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_states_are_solved_in_float32_algebra(solver: ti.solvers.Solver, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (0.2 * torch.randn(6, 6)).to(dtype).requires_grad_()
    x = torch.randn(4, 6).to(dtype)
    sol = ti.fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), solver=solver, batch_dims=1)
    assert sol.value.dtype == dtype and sol.converged.all() and sol.residual.dtype == torch.float32
    sol.value.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.dtype == dtype


@pytest.mark.parametrize("every", [1, 3, 16])
def test_warmup_of_newton_is_plain_iteration_whoever_looks(every: int) -> None:
    p = TanhProblem.make(batch=5, n=6, contraction=0.9)
    solver = ti.Newton(warmup=7, check_every=every, rtol=1e-12)
    sol = ti.fixed_point(p.map, p.start, solver=solver, batch_dims=1, trace=True)
    plain = ti.fixed_point(
        p.map,
        p.start,
        solver=ti.Picard(rtol=0.0, atol=1e-30),
        batch_dims=1,
        max_steps=7,
        trace=True,
        on_failure="ignore",
    )
    assert sol.trace is not None
    assert plain.trace is not None
    assert sol.converged.all()
    torch.testing.assert_close(sol.trace[:7], plain.trace)
    assert int(sol.steps.max()) <= 12
    untraced = ti.fixed_point(p.map, p.start, solver=solver, batch_dims=1)
    assert torch.equal(untraced.value, sol.value)
    assert torch.equal(untraced.steps, sol.steps)


def test_verbose_prints_a_line_for_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    factor = torch.tensor([[0.1], [0.5], [0.9]], dtype=DOUBLE)
    quiet = ti.fixed_point(lambda z: factor * z + 1, torch.zeros_like(factor), solver=ti.Picard(), batch_dims=1)
    assert capsys.readouterr().err == ""
    sol = ti.fixed_point(
        lambda z: factor * z + 1, torch.zeros_like(factor), solver=ti.Picard(), batch_dims=1, verbose=True
    )
    assert torch.equal(sol.value, quiet.value)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fixed_point: 3 samples"
    steps = lines[2:]
    assert len(steps) == int(sol.steps.max())
    assert [int(line.split()[0]) for line in steps] == list(range(1, len(steps) + 1))
    assert all(line.split()[1] == "Picard" for line in steps)
    assert steps[-1].split()[-2:] == ["100.0", "%"]
    assert float(steps[0].split()[4]) == pytest.approx(0.9, rel=1e-2)  # the largest residual after a step: 0.9


@dataclass(frozen=True)
class _Impatient(ti.solvers.Method):
    """Looks every ten steps whether a residual has halved."""

    def stages(self, problem: Any) -> tuple[ti.solvers.Stage, ...]:
        picard = ti.Picard(rtol=self.rtol, atol=self.atol, norm=self.norm)
        return (ti.solvers.Stage(picard, 60, patience=10, progress=0.5),)


@pytest.mark.parametrize("batch", [1, 3])
def test_who_converges_at_a_look_has_not_stalled(batch: int) -> None:
    rates = torch.tensor([0.0, 0.99], dtype=torch.float64)
    x = torch.tensor([[100.0, 1.0]], dtype=torch.float64).expand(batch, 2)
    # The residual is 0.99 ** k after k steps: it falls below the tolerance in step 20, but by a tenth in the last ten.
    solver = _Impatient(rtol=0.0, atol=0.99**19.5, norm="two")
    solution = ti.fixed_point(lambda z, x: rates * z + x, torch.zeros_like(x), x, batch_dims=1, solver=solver)
    assert bool((solution.status == int(ti.Status.CONVERGED)).all())
    assert solution.steps.tolist() == [20] * batch
