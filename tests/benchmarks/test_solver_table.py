"""The solver table judges every method by the same test, survives what a method does, and writes down what it saw."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch

import torchimplicit as ti
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.solver_claim import Attempt, Claim, Method, judge
from benchmarks.solver_ours import named_kinds, ours, with_criterion
from benchmarks.solver_peers import PEERS
from benchmarks.solver_report import markdown, rows
from benchmarks.solver_table import main, parse
from benchmarks.solver_worker import NotStartedError, Worker, attempt

SCALAR = PROBLEMS["classical-20-scalar"]  # x (x − 5)²


@pytest.mark.parametrize(
    "problem, point, success, outcome",
    [
        ("classical-20-scalar", [5.0], True, "solved"),
        ("classical-20-scalar", [5.0 + 1e-5], False, "solved"),  # 5e-10: what the method says does not matter
        ("classical-20-scalar", [1e-6], True, "loose"),  # 2.5e-5
        ("classical-20-scalar", [1e-6], False, "reported"),
        ("classical-20-scalar", [1.0], True, "false success"),
        ("classical-20-scalar", [np.nan], True, "false success"),
        ("classical-20-scalar", [np.inf], False, "reported"),
        ("classical-20-scalar", [0.0, 0.0], True, "false success"),  # not even a point of this problem
        ("decay", [40.0], True, "false success"),  # exp(−40) is below the tolerance, and no root
        ("decay", [40.0], False, "reported"),
    ],
)
def test_the_residual_decides(problem: str, point: list[float], success: bool, outcome: str) -> None:
    assert judge(PROBLEMS[problem], Claim(np.array(point), success))["outcome"] == outcome


def test_a_nan_residual_is_none() -> None:
    assert judge(PROBLEMS["log-of-negative"], Claim(np.array([-1.0]), False))["residual"] is None


def _fails_with(error: Exception) -> Method:
    def solve(_: object) -> Claim:
        raise error

    return Method("bad", "bad", solve)


def test_an_exception_is_an_outcome() -> None:
    made = attempt(_fails_with(ValueError("no\nmore")), SCALAR.name)
    assert (made.outcome, made.detail, made.claimed) == ("raised", "ValueError: no", None)


def test_a_peer_that_cannot_be_imported_is_unavailable_and_the_table_says_so() -> None:
    made = attempt(_fails_with(ImportError("No module named 'peer'")), SCALAR.name)
    assert made.outcome == "unavailable"
    told = {"command": "c", "date": "d", "python": "3", "versions": {}, "processor": "p", "limit_seconds": 1.0}
    text = markdown([made], [SCALAR], told)
    assert "| bad | – | – | – | – | not available |" in text
    assert "`bad` cannot be imported: ImportError: No module named 'peer'" in text


def test_an_attempt_over_the_limit_is_a_timeout_and_the_next_one_goes_on() -> None:
    with Worker("ti", limit=1e-6) as worker:
        assert worker.attempt(SCALAR.name).outcome == "timeout"
        worker._limit = 60.0
        assert worker.attempt(SCALAR.name).outcome == "solved"


def test_a_worker_that_cannot_start_says_why() -> None:
    with (
        Worker("no-such-method", limit=1.0) as worker,
        pytest.raises(NotStartedError, match="KeyError: 'no-such-method'"),
    ):
        worker.attempt(SCALAR.name)


def test_rows_count_by_set() -> None:
    def made(problem: str, outcome: str, residual: float | None) -> Attempt:
        return Attempt("m", problem, outcome, True, residual)

    attempts = [
        made("classical-20-scalar", "solved", 0.0),
        made("classical-22-boggs", "loose", 1e-5),
        made("mgh-wood-x10", "timeout", None),
        made("decay", "false success", 1e-17),
        made("square-plus-one", "reported", 1.0),
        made("pole", "raised", None),
    ]
    (row,) = rows(attempts, [PROBLEMS[one.problem] for one in attempts])
    assert row.solved == {"classical": 1, "mgh-x1": 0, "mgh-x10": 0, "mgh-x100": 0, "large": 0, "domain": 0}
    assert (row.nearly, row.total) == (2, 1)
    assert (row.refused, row.false, row.false_at_infinity, row.raised, row.late) == (1, 1, 1, 1, 1)


def test_our_rows_are_the_default_and_every_solver_that_finds_a_root() -> None:
    names = [method.name for method in ours()]
    assert names[:2] == ["ti", "ti-strict"]
    assert {"ti-Newton", "ti-Anderson", "ti-Picard"} <= set(names)
    assert not {"ti-Bisection", "ti-Chandrupatla", "ti-Solver"} & set(names)
    assert set(named_kinds()) == {name.removeprefix("ti-") for name in names[2:]}


def test_the_criterion_is_on_the_largest_component() -> None:
    make = with_criterion(ti.Newton)
    assert make is not None
    solver = make()
    assert (solver.atol, solver.rtol, solver.norm) == (1e-8, 0.0, "max")


@pytest.mark.parametrize("method", [m for m in PEERS if m.family in ("scipy", "xitorch")], ids=lambda m: m.name)
def test_a_peer_solves_an_easy_equation_and_says_so(method: Method) -> None:
    if method.family == "xitorch":
        pytest.importorskip("xitorch")
    sign = -1 if method.family == "scipy" else 1  # linear mixing takes the sign of the Jacobian for granted
    easy = Problem("easy", (0.5, 0.0), lambda z, xp: sign * (z + 0.1 * z**3 - 1.1), ((1.0, 1.0),))
    claim = method.solve(easy)
    assert judge(easy, claim)["outcome"] == "solved"
    assert claim.success
    assert torch.as_tensor(claim.point).tolist() == pytest.approx([1.0, 1.0])


def test_the_command_writes_the_attempts_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = ["classical-17-*", "square-plus-one"]
    assert main(["--methods", "ti", "scipy-hybr", "--problems", *problems, "--jobs", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "solvers.json").read_text())
    outcomes = {(made["method"], made["problem"]): made["outcome"] for made in result["attempts"]}
    assert outcomes == {
        ("ti", "classical-17-dennis-schnabel"): "solved",
        ("ti", "square-plus-one"): "reported",
        ("scipy-hybr", "classical-17-dennis-schnabel"): "solved",
        ("scipy-hybr", "square-plus-one"): "reported",
    }
    assert result["versions"]["scipy"] == scipy.__version__
    assert "--out DIR" in result["command"]
    text = (tmp_path / "SOLVERS.md").read_text()
    assert "| method | classical (1) | no root, says so (1) | false successes |" in text
    assert "| ti | 1 [1] | 1 | 0 | 0 | 0 | 1 |" in text
    assert str(tmp_path) not in text + (tmp_path / "solvers.json").read_text()
    assert "scipy-hybr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--methods", "sicpy-hybr"], "--methods sicpy-hybr: nothing has that name"),
        (["--problems", "classical", "x"], "--problems x: nothing has that name"),
        (["--limit", "0"], "--limit 0.0"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_an_invalid_option_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_quick_leaves_out_what_is_slow() -> None:
    settings = parse(["--quick"])
    assert settings.limit == 5.0
    assert "ti" in settings.methods
    assert "optimistix-Newton" not in settings.methods
    assert "classical-01-rosenbrock" in settings.problems
    assert "mgh-wood-x100" not in settings.problems
    assert parse([]).limit == 20.0
    assert len(parse([]).problems) == 98
