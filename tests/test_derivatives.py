"""Derivatives of every order and mode: against the same derivative of the unrolled iteration, form by form."""

from functools import cache

import pytest
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torchimplicit as ti
from tests.modes import FORMS, MODES, OTHERS, THETA, Case, assert_near
from tests.problems import SOLVERS, TIGHT

CASES = FORMS | OTHERS
FULL = {"minimize": ti.Newton(rtol=TIGHT), "least_squares": ti.LevenbergMarquardt(rtol=TIGHT)}
SAMPLED = ("picard", "anderson", "broyden", "newton_krylov", "auto")
DIAGONAL = [
    (solver, list(FORMS)[(i + j) % len(FORMS)], mode)
    for i, solver in enumerate(SAMPLED)
    for j, mode in enumerate(MODES)
]


@cache
def reference(case: str, mode: str) -> Tensor:
    return MODES[mode](CASES[case].unrolled)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_derivative_equals_that_of_the_unrolled_iteration(case: str, mode: str) -> None:
    made: Case = CASES[case]
    solver = FULL.get(case, SOLVERS["newton"])
    assert_near(MODES[mode](made.solved(solver)), reference(case, mode))


@pytest.mark.parametrize("solver, case, mode", DIAGONAL)
def test_derivatives_do_not_depend_on_the_solver(solver: str, case: str, mode: str) -> None:
    assert_near(MODES[mode](FORMS[case].solved(SOLVERS[solver])), reference(case, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["minimize", "least_squares", "root"])
def test_derivatives_with_the_default_solver(case: str, mode: str) -> None:
    assert_near(MODES[mode](OTHERS[case].solved(SOLVERS["auto"])), reference(case, mode))


@pytest.mark.parametrize("name", ["closure", "args", "root", "minimize", "least_squares"])
def test_gradcheck_in_every_mode(name: str) -> None:
    case = CASES[name]
    f = case.solved(ti.LevenbergMarquardt(rtol=TIGHT) if name == "least_squares" else SOLVERS["newton"])
    leaf = THETA.clone().requires_grad_()
    assert gradcheck(f, leaf, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, leaf, check_fwd_over_rev=True)
