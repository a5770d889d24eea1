"""`compare_solvers`: its figures are those of theory and of a look by hand, and it claims nothing that is not so."""

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.diagnostics import SolverResult, _candidates

RATE = 0.9
FIXED = {
    "Auto()",
    "Picard()",
    "Anderson()",
    "Broyden()",
    "Broyden(update='good')",
    "NewtonKrylov()",
    "Chord()",
    "Newton()",
    "Dogleg()",
    "LevenbergMarquardt()",
}
DENSE = {"Chord()", "Newton()", "Dogleg()", "LevenbergMarquardt()"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q = torch.linalg.qr(normal(6, 6))[0]
B = normal(4, 6, seed=1)
SOLUTION = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - RATE * Q, B.T).T


def linear(z: Tensor, b: Tensor) -> Tensor:
    """`0.9 Q z + b`, Q orthogonal: the residual of Picard's iterates falls by exactly 0.9."""
    return RATE * z @ Q.T + b


def without_root(z: Tensor) -> Tensor:
    return z**2 + 1


def rosenbrock(z: Tensor) -> Tensor:
    return torch.stack((1 - z[:, 0], 10 * (z[:, 1] - z[:, 0] ** 2)), dim=1)


def valley(z: Tensor) -> Tensor:
    return 0.5 * rosenbrock(z).square().sum(dim=1)


VALLEY = torch.tensor([[-1.2, 1.0], [0.0, 0.5]], dtype=torch.float64)


@pytest.fixture(scope="module")
def contraction() -> ti.Comparison:
    return ti.compare_solvers(lambda z: linear(z, B), 0 * B, batch_dims=1, rtol=0.0, atol=1e-8, repeats=1)


@pytest.fixture(scope="module")
def hopeless() -> ti.Comparison:
    z0 = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    solvers = [ti.Picard(), ti.Anderson(), ti.Newton(), ti.Dogleg(), ti.Broyden()]
    return ti.compare_solvers(without_root, z0, kind="root", batch_dims=1, solvers=solvers, repeats=1)


def test_all_applicable_solvers_run_and_agree(contraction: ti.Comparison) -> None:
    assert {row.name for row in contraction.rows} == FIXED
    for row in contraction.rows:
        assert (row.error, row.converged, row.solved, row.failures, row.refuted, row.elsewhere) == (
            None,
            1,
            4,
            {},
            0,
            0,
        )
        # ‖z − z*‖ ≤ ‖r‖ / (1 − 0.9), and ‖r‖ = √6 rms(r).
        assert (row.value - SOLUTION).norm(dim=1).max() <= 10 * 6**0.5 * 1e-8


def test_picards_steps_and_evaluations_are_those_of_theory(contraction: ti.Comparison) -> None:
    row = contraction["Picard()"]
    first = B.square().mean(dim=1).sqrt()  # the residual at 0 is b
    steps = sorted(math.ceil(math.log(1e-8 / size) / math.log(RATE)) for size in first.tolist())
    assert row.steps == (steps[1] + steps[2]) / 2
    assert row.max_steps == steps[3]
    assert row.evaluations == steps[3] + 1
    assert row.trace is not None
    assert row.trace.worst[:21] == pytest.approx([float(first.max()) * RATE**k for k in range(21)])
    assert row.trace.evaluations == tuple(range(1, steps[3] + 2))


def test_residuals_are_those_of_the_returned_values_in_the_norm_of_the_tolerance(contraction: ti.Comparison) -> None:
    for row in contraction.rows:
        residual = (linear(row.value, B) - row.value).square().mean(dim=1).sqrt()
        low, high = residual.sort().values[1:3]
        assert row.worst_residual == pytest.approx(float(residual.max()), rel=1e-6, abs=1e-15)
        assert row.residual == pytest.approx(float(low + high) / 2, rel=1e-6, abs=1e-15)
        assert row.worst_residual <= row.tolerance == pytest.approx(1e-8)
    largest = ti.compare_solvers(linear, 0 * B, B, batch_dims=1, solvers=[ti.Picard(norm="max")], repeats=1).rows[0]
    residual = (linear(largest.value, B) - largest.value).abs().amax(dim=1)
    assert largest.worst_residual == pytest.approx(float(residual.max()), rel=1e-6)


def test_evaluations_are_those_of_the_calls_themselves(contraction: ti.Comparison) -> None:
    for row in contraction.rows:
        with torch.no_grad():
            alone = ti.fixed_point(lambda z: linear(z, B), 0 * B, batch_dims=1, solver=row.solver)
        assert (row.evaluations, row.max_steps) == (alone.evaluations, int(alone.steps.max()))
        assert row.trace is not None
        assert row.trace.evaluations[-1] == row.evaluations
        assert row.trace.evaluations[0] == 1
        assert len(row.trace.evaluations) == len(row.trace.median) == len(row.trace.worst) == row.max_steps + 1
        assert row.trace.worst[-1] == pytest.approx(row.worst_residual, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("by", ["evaluations", "seconds"])
def test_the_best_is_the_one_that_solved_everything_at_least_cost(contraction: ti.Comparison, by: Any) -> None:
    costs = {row.name: getattr(row, by) for row in contraction.rows}
    assert min(costs.values()) > 0
    best = contraction.best(by)
    assert best is not None
    assert costs[best.name] == min(costs.values())
    ranked = [costs[row.name] for row in contraction.ranked(by)]
    assert ranked == sorted(ranked)
    if by == "evaluations":
        assert contraction.rows == contraction.ranked(by)
        assert contraction["Picard()"].evaluations > best.evaluations


def test_one_that_leaves_samples_unsolved_is_never_the_best() -> None:
    comparison = ti.compare_solvers(
        linear, 0 * B, B, batch_dims=1, atol=1e-8, solvers={"short": ti.Picard(), "whole": ti.Newton()}, max_steps=5
    )
    assert [row.name for row in comparison.rows] == ["whole", "short"]
    assert comparison["short"].evaluations < comparison["whole"].evaluations
    assert comparison["short"].failures == {ti.Status.MAX_STEPS: 4}
    assert comparison.best() is comparison["whole"] is comparison.best("seconds")


def test_the_table_stars_the_best_of_each_column_in_aligned_columns(contraction: ti.Comparison) -> None:
    lines = str(contraction).splitlines()
    assert lines[0].startswith("fixed_point: 4 samples of 6 unknowns, float64, cpu")
    header, body = lines[1], lines[2 : 2 + len(FIXED)]
    header = header.replace("[µs]", "[ms]")
    assert header.split() == ["solver", "solved", "steps", "max", "evaluations", "time", "[ms]", "residual", "worst"]
    assert [line.split()[0].partition("(")[0] for line in body] == [
        row.name.partition("(")[0] for row in contraction.rows
    ]
    column = header.index("evaluations") + len("evaluations")  # its last digit is above here, its star after it
    few, fast = contraction.best(), contraction.best("seconds")
    assert few is not None and fast is not None
    for line, row in zip(body, contraction.rows, strict=True):
        assert line[:column].endswith(f" {row.evaluations}")
        assert (line[column : column + 1] == "*") == (row.evaluations == few.evaluations)
    assert f"fewest evaluations {few.name} ({few.evaluations})" in str(contraction)
    assert f"least time {fast.name} (" in str(contraction)
    by_time = contraction.table("seconds").splitlines()[2]
    assert by_time.startswith(fast.name)
    assert repr(contraction) == str(contraction)


def test_of_an_equation_without_root_nothing_is_claimed_and_failures_are_counted(hopeless: ti.Comparison) -> None:
    for row in hopeless.rows:
        assert (row.converged, row.solved, row.refuted, row.error) == (0.0, 0, 0, None)
        assert sum(row.failures.values()) == 3 and ti.Status.CONVERGED not in row.failures
        assert row.residual >= 1.0  # z² + 1 is nowhere less
    assert hopeless["Picard()"].failures == {ti.Status.DIVERGED: 3}
    assert hopeless["Dogleg()"].failures == {ti.Status.STALLED: 3}
    assert hopeless.best() is None is hopeless.best("seconds")
    assert "No solver solved every sample." in str(hopeless)
    assert "*" not in str(hopeless)
    assert "3 STALLED" in str(hopeless)


def test_of_a_root_every_kind_of_solver_runs_by_default() -> None:
    comparison = ti.compare_solvers(
        lambda z: z**3 + z - 10, torch.ones((), dtype=torch.float64), kind="root", repeats=1
    )
    assert {row.name for row in comparison.rows} == FIXED
    assert comparison.rows[0].solved == 1
    for row in comparison.rows:
        if row.solved:
            assert float(row.value) == pytest.approx(2.0)
    assert " max " not in str(comparison) and " worst" not in str(comparison)  # of one sample


@pytest.mark.parametrize(
    "kind, fn, names",
    [
        ("minimize", valley, {"Auto()", "LBFGS()", "NewtonCG()"}),
        (
            "least_squares",
            rosenbrock,
            {
                "Auto()",
                "LBFGS()",
                "NewtonCG()",
                "Dogleg()",
                "LevenbergMarquardt()",
                "LevenbergMarquardt(linear_solver='cg')",
            },
        ),
    ],
)
def test_minima_are_found_by_all_that_apply(kind: Any, fn: Callable[[Tensor], Tensor], names: set[str]) -> None:
    comparison = ti.compare_solvers(fn, VALLEY, kind=kind, batch_dims=1, repeats=1)
    assert {row.name for row in comparison.rows} == names
    for row in comparison.rows:
        assert (row.error, row.solved, row.elsewhere) == (None, 2, 0)
        assert row.value == pytest.approx(torch.ones(2, 2), abs=1e-5)
        z = row.value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(valley(z).sum(), z)
        assert row.worst_residual == pytest.approx(float(gradient.square().mean(dim=1).sqrt().max()), abs=1e-15)
        assert row.objective is not None and 0 <= row.objective <= 1e-9
    assert "objective" in str(comparison) and "rms of the gradient" in str(comparison)


def test_solvers_of_a_dict_have_its_labels_and_keep_what_the_call_does_not_say() -> None:
    solvers = {"loose": ti.Picard(rtol=1e-2, atol=1e-3), "tight": ti.Picard(rtol=1e-10), "newton": ti.Newton()}
    comparison = ti.compare_solvers(linear, 0 * B, B, batch_dims=1, solvers=solvers, rtol=1e-6, repeats=1)
    assert {row.name for row in comparison.rows} == set(solvers)
    given = {row.name: (row.solver.rtol, row.solver.atol) for row in comparison.rows}
    assert given == {"loose": (1e-6, 1e-3), "tight": (1e-6, None), "newton": (1e-6, None)}
    own = ti.compare_solvers(linear, 0 * B, B, batch_dims=1, solvers=solvers, repeats=1)
    assert [row.solver for row in own.ranked()] == [solvers[row.name] for row in own.ranked()]
    assert own["loose"].evaluations < own["tight"].evaluations
    with pytest.raises(KeyError, match="'tihgt'; did you mean 'tight'"):
        own["tihgt"]


def test_solvers_of_a_list_are_told_apart() -> None:
    solvers = [ti.Picard(), ti.Picard(), ti.Picard(damping=0.5), ti.NewtonKrylov(linear_solver=ti.GMRES(restart=3))]
    comparison = ti.compare_solvers(linear, 0 * B, B, batch_dims=1, solvers=solvers, atol=1e-2, repeats=1)
    assert {row.name for row in comparison.rows} == {
        "Picard()",
        "Picard() #2",
        "Picard(damping=0.5)",
        "NewtonKrylov(linear_solver=GMRES(restart=3))",
    }


def test_a_solver_that_raises_is_a_row_with_its_error() -> None:
    solvers = {"wrong kind": ti.LBFGS(), "wrong size": ti.Bisection(0.0, 1.0), "newton": ti.Newton()}
    comparison = ti.compare_solvers(linear, 0 * B, B, batch_dims=1, solvers=solvers, repeats=1)
    assert [row.name for row in comparison.rows] == ["newton", "wrong kind", "wrong size"]
    row = comparison["wrong kind"]
    assert row.error is not None and row.error.startswith("TypeError: solver: this one minimises an objective")
    assert (row.solved, row.converged, row.value, row.trace) == (0, 0.0, None, None)
    assert "wrong size: ValueError: Bisection: brackets one real unknown" in str(comparison)
    best = comparison.best()
    assert best is not None and best.name == "newton"


def test_only_the_first_line_of_an_error_is_told() -> None:
    class Broken(ti.Picard):
        def steps(self, *_: Any) -> Any:
            raise RuntimeError("one\ntwo")

    comparison = ti.compare_solvers(linear, 0 * B, B, solvers=[Broken()], repeats=1)
    assert comparison.rows[0].error == "RuntimeError: one"
    assert comparison.best() is None
    assert "two" not in str(comparison)


def test_errors_of_the_problem_itself_are_raised() -> None:
    with pytest.raises(ValueError, match="must return the shape of z0"):
        ti.compare_solvers(lambda z: z.sum(), torch.ones(3))
    with pytest.raises(TypeError, match="one per sample"):
        ti.compare_solvers(lambda z: (z, z), torch.ones(3), kind="minimize")
    with pytest.raises(ZeroDivisionError):
        ti.compare_solvers(lambda z: z / (1 // 0), torch.ones(3))
    with pytest.raises(ValueError, match="no samples"):
        ti.compare_solvers(lambda z: z, torch.ones(0, 3), batch_dims=1)


def test_solutions_that_differ_are_counted() -> None:
    z0 = torch.tensor([0.5, 3.0, 0.5], dtype=torch.float64)
    solvers = {"low": ti.Bisection(-2.0, 0.9 * z0 + 0.3), "high": ti.Bisection(-0.5, 3.5)}
    comparison = ti.compare_solvers(lambda z: z**2 - 1, z0, kind="root", batch_dims=1, solvers=solvers, repeats=1)
    assert comparison["low"].failures == {ti.Status.STALLED: 1}  # no sign changes between −2 and 3
    assert comparison["low"].value[[0, 2]].tolist() == pytest.approx([-1.0, -1.0])
    assert comparison.rows[0].name == "high"
    assert comparison["low"].elsewhere == 2
    assert "more than 10 % from that of high" in str(comparison)


def test_a_start_outside_the_domain_leaves_no_tolerance_to_tell() -> None:
    solvers = {"moves the start": ti.Auto(), "does not": ti.Newton()}
    comparison = ti.compare_solvers(torch.log, torch.tensor(-1.0).double(), kind="root", solvers=solvers, repeats=1)
    assert [row.name for row in comparison.rows] == list(solvers)
    assert comparison["moves the start"].solved == 1 and float(comparison.rows[0].value) == pytest.approx(1.0)
    assert comparison["does not"].failures == {ti.Status.NONFINITE: 1}
    assert comparison["does not"].residual == math.inf
    assert math.isnan(comparison.rows[0].tolerance) and "tolerance" not in str(comparison)


def test_a_coarse_state_is_called_what_it_is() -> None:
    z0 = torch.zeros(3, dtype=torch.bfloat16)
    comparison = ti.compare_solvers(lambda z: 0.5 * z + 1, z0, solvers=[ti.Picard()], repeats=1)
    assert comparison.dtype == torch.bfloat16 and ", bfloat16, " in str(comparison)
    assert comparison.rows[0].value.dtype == torch.bfloat16 and comparison.rows[0].solved == 1


def test_a_claim_that_an_evaluation_does_not_bear_out_is_refuted() -> None:
    numbers = itertools.cycle((1.0, 1e-12))  # the last call of a solve is given the second, the one after it the first

    def fickle(z: Tensor) -> Tensor:
        return z + next(numbers)

    solver = ti.Picard(atol=1e-6, rtol=0.0)
    comparison = ti.compare_solvers(fickle, torch.zeros((), dtype=torch.float64), solvers=[solver], repeats=1)
    (row,) = comparison.rows
    assert row.worst_residual == 1.0
    assert (row.solved, row.refuted, row.failures) == (0, 1, {})
    assert "1 refuted" in str(comparison) and comparison.best() is None


def test_random_numbers_and_buffers_are_left_as_they_were_and_are_the_same_for_all() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return 0.1 * z + torch.rand_like(z) + self.calls

    cell = Noisy()
    before = torch.get_rng_state()
    solvers = [ti.Picard(), ti.Picard(check_every=1), ti.Picard()]
    comparison = ti.compare_solvers(cell, torch.zeros(2), solvers=solvers, max_steps=3, repeats=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert cell.calls == 0
    values = [row.value.tolist() for row in comparison.rows]
    assert values[0] == values[1] == values[2]


def test_nothing_is_recorded_for_gradients_and_no_warning_is_given() -> None:
    weight = torch.eye(3, requires_grad=True)
    z0 = torch.zeros(2, 3, requires_grad=True)
    comparison = ti.compare_solvers(lambda z: 2 * z @ weight + 1, z0, solvers=[ti.Picard()], max_steps=2, repeats=1)
    assert not comparison.rows[0].value.requires_grad
    assert comparison.rows[0].solved == 0  # pytest makes an error of the warning that this would be


def test_a_tree_of_tensors_comes_back_as_one() -> None:
    z0 = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": (torch.zeros(2, dtype=torch.complex128),)}

    def fn(z: Any) -> Any:
        return {"a": 0.5 * z["a"] + 1, "b": (0.5j * z["b"][0] + 1,)}

    comparison = ti.compare_solvers(fn, z0, batch_dims=1, repeats=1)
    assert comparison.unknowns == 5
    for row in comparison.rows:
        assert row.solved == 2
        assert row.value["a"] == pytest.approx(torch.full((2, 3), 2.0))
        torch.testing.assert_close(row.value["b"][0], torch.full((2,), 1 / (1 - 0.5j), dtype=torch.complex128))


@pytest.mark.parametrize("kind", ["fixed_point", "least_squares"])
def test_dense_solvers_are_skipped_where_their_jacobians_are_large(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_candidates, "DENSE_BYTES", 8 * 4 * 6 * 6 - 1)
    comparison = ti.compare_solvers(linear, 0 * B, B, kind=kind, batch_dims=1, repeats=1, max_steps=1)
    left = DENSE if kind == "fixed_point" else {"Dogleg()", "LevenbergMarquardt()"}
    assert set(comparison.skipped) == left
    assert not left & {row.name for row in comparison.rows}
    assert "skipped: " in str(comparison) and "Jacobians would take" in str(comparison)
    monkeypatch.setattr(_candidates, "DENSE_BYTES", 8 * 4 * 6 * 6)
    again = ti.compare_solvers(linear, 0 * B, B, kind=kind, batch_dims=1, repeats=1, max_steps=1)
    assert again.skipped == () and left <= {row.name for row in again.rows}
    assert "skipped" not in str(again)


def test_it_is_silent_unless_asked_and_then_tells_each_solver(capfd: pytest.CaptureFixture[str]) -> None:
    solvers = {"p": ti.Picard(), "wrong": ti.LBFGS(), "short": ti.Picard(damping=0.1)}
    options: dict[str, Any] = {"batch_dims": 1, "solvers": solvers, "max_steps": 300, "repeats": 1}
    ti.compare_solvers(linear, 0 * B, B, **options)
    assert capfd.readouterr() == ("", "")
    ti.compare_solvers(linear, 0 * B, B, verbose=True, **options)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("compare_solvers: p: 4/4 solved, ")
    assert lines[1].startswith("compare_solvers: wrong: TypeError: ")
    assert lines[2].startswith("compare_solvers: short: 0/4 solved, 302 evaluations, ")
    assert lines[2].endswith(" (4 MAX_STEPS)")


@pytest.mark.parametrize("x", ["evaluations", "steps"])
@pytest.mark.parametrize("case", ["contraction", "hopeless"])
def test_a_plot_is_written(case: str, x: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    comparison: ti.Comparison = request.getfixturevalue(case)
    path = tmp_path / "decay.png"
    axes = comparison.plot(path, x=x)
    assert path.stat().st_size > 10_000
    assert path.read_bytes().startswith(b"\x89PNG")
    legend = axes.get_legend()
    assert legend is not None
    told = [text.get_text() for text in legend.get_texts()]
    assert [text.partition(":")[0] for text in told[: len(comparison.rows)]] == [row.name for row in comparison.rows]
    assert any(text.startswith("tolerance") for text in told)
    assert "units of" in axes.get_ylabel() and axes.get_xlabel().startswith(x)
    assert axes.get_yscale() == "log"
    lines = [line for line in axes.get_lines() if line.get_label() in told[: len(comparison.rows)]]
    styles = {(line.get_color(), str(vars(line)["_dash_pattern"])) for line in lines}
    assert len(styles) == len(comparison.rows)
    assert axes.get_ylim()[0] < comparison.rows[0].tolerance < axes.get_ylim()[1]


def test_a_plot_shows_the_residuals_of_the_trace(contraction: ti.Comparison) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert contraction.plot(ax=axes, sample="median") is axes
    (line,) = (line for line in axes.get_lines() if line.get_label() == "Picard()")
    trace = contraction["Picard()"].trace
    assert trace is not None
    assert list(line.get_xdata()) == list(trace.evaluations)  # pyright: ignore[reportArgumentType]
    assert list(line.get_ydata()) == list(trace.median)  # pyright: ignore[reportArgumentType]


def test_a_plot_of_errors_and_zeros_alone_can_be_drawn(tmp_path: Path) -> None:
    solvers = {"wrong": ti.LBFGS(), "p": ti.Picard()}
    ti.compare_solvers(linear, 0 * B, B, solvers=[ti.LBFGS()], repeats=1).plot(tmp_path / "errors.png")
    ti.compare_solvers(lambda z: z, torch.zeros(2), solvers=solvers, repeats=1).plot(tmp_path / "zeros.png")
    ti.compare_solvers(linear, 0 * B, B, max_steps=0, repeats=1).plot(tmp_path / "starts.png", x="steps")
    nowhere = ti.compare_solvers(lambda z: z * math.nan, torch.ones(2), kind="root", repeats=1)
    nowhere.plot(tmp_path / "nowhere.png")
    assert len(list(tmp_path.iterdir())) == 4
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 0


def test_without_matplotlib_a_plot_says_what_to_install(
    contraction: ti.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib.*torchimplicit\[train\]"):
        contraction.plot()


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"batch_dim": 1}, TypeError, "compare_solvers: unknown option 'batch_dim'; did you mean 'batch_dims'"),
        ({"solver": ti.Newton()}, TypeError, "unknown option 'solver'; did you mean 'solvers'"),
        ({"kind": "fixedpoint"}, ValueError, "kind='fixedpoint' is not known; did you mean 'fixed_point'"),
        ({"solvers": "Newton"}, TypeError, "solvers='Newton' is neither a list"),
        ({"solvers": ["Newton"]}, TypeError, "'Newton' is no solver"),
        ({"solvers": [ti.Newton]}, TypeError, "is no solver; give an instance"),
        ({"solvers": {1: ti.Newton()}}, TypeError, "label 1 of a solver is no string"),
        ({"solvers": []}, ValueError, "solvers is empty"),
        ({"rtol": -1.0}, ValueError, "rtol=-1.0 is not valid"),
        ({"atol": math.nan}, ValueError, "atol=nan is not valid"),
        ({"max_steps": -1}, ValueError, "max_steps=-1 is not valid"),
        ({"repeats": 0}, ValueError, "repeats=0 is not valid"),
        ({"repeats": 1.5}, ValueError, "repeats=1.5 is not valid"),
        ({"batch_dims": 3}, ValueError, "batch_dims=3 is larger"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error) as raised:
        ti.compare_solvers(linear, 0 * B, B, **options)
    assert told in str(raised.value)


def test_a_bad_option_of_the_comparison_is_named(contraction: ti.Comparison) -> None:
    with pytest.raises(TypeError, match="fn must be callable"):
        ti.compare_solvers(3, B)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="by='second' is not known; did you mean 'seconds'"):
        contraction.table("second")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="x='step' is not known; did you mean 'steps'"):
        contraction.plot(x="step")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sample='wurst' is not known; did you mean 'worst'"):
        contraction.plot(sample="wurst")  # pyright: ignore[reportArgumentType]


def test_figures_of_a_row_that_raised_are_no_numbers() -> None:
    row = SolverResult("x", ti.Picard(), error="E")
    assert all(math.isnan(value) for value in (row.steps, row.seconds, row.residual, row.tolerance))
