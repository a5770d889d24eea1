"""CG, BiCGStab, QR and preconditioners one by one: iterates of the textbook, steps of the theory, their failures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchimplicit as ti
from tests.problems import gradients
from tests.systems import (
    RTOL,
    Dense,
    N,
    contraction,
    definite,
    normal,
    orthogonal,
    skew,
    spectrum,
    suited,
    true_residual,
)
from torchimplicit.linear import CG, GMRES, LU, QR, BiCGStab, Cascade, Jacobi, LinearSolver, ResidualJacobian, _krylov
from torchimplicit.linear._operator import AutogradJacobian, SuppliedJacobian

DOUBLE = torch.float64
EPSILON = torch.finfo(DOUBLE).eps
KRYLOV: dict[str, Callable[..., LinearSolver]] = {"GMRES": GMRES, "BiCGStab": BiCGStab, "CG": CG}


@pytest.fixture(params=[0, 10**9], ids=["compacting", "whole"])
def worthwhile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Samples that are done leave the batch, or never do."""
    monkeypatch.setattr(_krylov, "_WORTHWHILE", request.param)
    return request.param


# --- Conjugate gradients


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_cg_needs_one_step_per_distinct_eigenvalue(distinct: int) -> None:
    matrix, b = spectrum(*[1.0 + i % distinct for i in range(N)]), normal(5, N, seed=9)
    found = CG().solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert found.steps.tolist() == [distinct] * 5
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_cg_has_the_iterates_of_scipy(steps: int, preconditioned: bool) -> None:
    matrix, b = spectrum(*torch.logspace(0, 3, N).tolist()), normal(5, N, seed=9)
    found = CG(max_steps=steps, preconditioner=Jacobi() if preconditioned else None).solve(Dense(matrix), b, 1e-15)
    assert found.steps.tolist() == [steps] * 5
    for i in range(5):
        a = matrix[i].numpy()
        m = np.diag(1 / np.diag(a)) if preconditioned else None
        expected, _ = scipy.sparse.linalg.cg(a, b[i].numpy(), rtol=0.0, maxiter=steps, M=m)
        torch.testing.assert_close(found.value[i], torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_cg_is_within_the_chebyshev_bound() -> None:
    condition, b = 100.0, normal(5, 60, seed=9)
    matrix = spectrum(*torch.linspace(1, condition, 60).tolist())
    x = torch.linalg.solve(matrix, b)
    factor = (condition**0.5 - 1) / (condition**0.5 + 1)

    def energy(error: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", error, matrix, error).sqrt()

    for steps in (15, 25, 35):
        found = CG(max_steps=steps).solve(Dense(matrix), b, 1e-15)
        assert (energy(found.value - x) <= 2 * factor**steps * energy(x)).all()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "matrix",
    [-definite(0.5), spectrum(*torch.linspace(-1, 1, N).tolist()), skew(), torch.zeros(5, N, N, dtype=DOUBLE)],
    ids=["negative", "indefinite", "skew", "zero"],
)
def test_cg_calls_singular_what_is_not_positive_definite(matrix: Tensor, verify: bool) -> None:
    operator = Dense(matrix)
    found = CG().solve(operator, normal(5, N, seed=9), RTOL, verify)
    assert found.status.tolist() == [ti.Status.SINGULAR] * 5
    assert found.value.count_nonzero() == 0
    assert found.residual.tolist() == [1.0] * 5
    assert operator.products <= N + 1


def test_cg_calls_singular_a_semidefinite_system_without_a_solution() -> None:
    matrix = spectrum(0.0, 0.0, *torch.linspace(0.5, 1.5, N - 2).tolist())
    found = CG().solve(Dense(matrix), normal(5, N, seed=9), RTOL)
    assert found.status.tolist() == [ti.Status.SINGULAR] * 5
    assert (found.steps < 2 * N).all()


@pytest.mark.parametrize("dtype, condition", [(DOUBLE, 1e13), (torch.float32, 1e4)], ids=str)
def test_cg_takes_an_ill_conditioned_definite_matrix_for_definite(dtype: torch.dtype, condition: float) -> None:
    values = torch.logspace(0, float(np.log10(condition)), N, dtype=DOUBLE).tolist()
    matrix, x = spectrum(*values).to(dtype), normal(5, N, seed=9).to(dtype)
    found = CG().solve(Dense(matrix), torch.einsum("bij,bj->bi", matrix, x), 1e-4)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5


def test_cg_on_an_unsymmetric_matrix_claims_nothing() -> None:
    matrix, b = contraction(0.8), normal(5, N, seed=9)
    found = CG(max_steps=60).solve(Dense(matrix), b, RTOL)
    assert not (found.status == ti.Status.CONVERGED).any()
    torch.testing.assert_close(found.residual, true_residual(matrix, b, found.value), rtol=1e-6, atol=0)


# --- BiCGStab


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_bicgstab_has_the_iterates_of_scipy_where_omega_is_large(steps: int) -> None:
    matrix, b = contraction(0.3), normal(5, N, seed=9)
    found = BiCGStab(max_steps=steps).solve(Dense(matrix), b, 1e-15)
    assert found.steps.tolist() == [steps] * 5
    for i in range(5):
        expected, _ = scipy.sparse.linalg.bicgstab(matrix[i].numpy(), b[i].numpy(), rtol=0.0, maxiter=steps)
        torch.testing.assert_close(found.value[i], torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_bicgstab_needs_no_more_than_one_step_per_distinct_eigenvalue(distinct: int) -> None:
    operator = Dense(spectrum(*[1.0 + i % distinct for i in range(N)]))
    found = BiCGStab().solve(operator, normal(5, N, seed=9), RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert (found.steps <= distinct).all()
    assert operator.products <= 2 * distinct + 1


def test_bicgstab_gets_past_both_of_its_breakdowns() -> None:
    # b is orthogonal to A b in both: σ = 0 in the first step. In a skew matrix ω = 0 in every step besides.
    shift = torch.roll(torch.eye(N, dtype=DOUBLE), 1, 0)
    matrix = torch.stack([shift, skew()[0], definite(0.5)[0]])
    b = torch.eye(N, dtype=DOUBLE)[:3]
    found = BiCGStab().solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 3
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=0, atol=1e-7)
    assert found.steps[2] < found.steps[:2].min()


@pytest.mark.parametrize("verify", [True, False])
def test_bicgstab_calls_singular_only_what_takes_a_residual_to_zero(verify: bool) -> None:
    matrix, b = contraction(0.5), normal(5, N, seed=9)
    matrix[1] = 0.0
    matrix[3, :, 0] = 0.0
    b[3] = torch.eye(N, dtype=DOUBLE)[0]
    found = BiCGStab().solve(Dense(matrix), b, RTOL, verify)
    assert found.status.tolist() == [0, ti.Status.SINGULAR, 0, ti.Status.SINGULAR, 0]
    assert found.value[[1, 3]].count_nonzero() == 0


def test_bicgstab_gives_up_a_cycle_in_which_the_residual_explodes() -> None:
    # σ = bᵀAb = 10⁻¹² ‖b‖²: the first step takes the residual up to 10¹².
    operator = Dense(skew() + 1e-12 * torch.eye(N, dtype=DOUBLE))
    found = BiCGStab(max_steps=3).solve(operator, normal(5, N, seed=9), RTOL)
    assert found.steps.tolist() == [3] * 5
    assert operator.products == (2 + 1) + (2 * 2 + 1)  # one step and its check, two steps from anew and theirs
    assert (found.residual <= 1.0).all()


def test_bicgstab_takes_half_a_step_where_there_is_no_other_half() -> None:
    # s = b − A b is in the null space: A s = 0, and every ω is as good.
    matrix = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]], dtype=DOUBLE)
    found = BiCGStab(max_steps=1).solve(Dense(matrix), torch.tensor([[1.0, 0.0]], dtype=DOUBLE), RTOL)
    assert found.status.item() == ti.Status.MAX_STEPS
    torch.testing.assert_close(found.value, torch.tensor([[1.0, 0.0]], dtype=DOUBLE))
    assert found.residual.item() == pytest.approx(0.5)


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("name", KRYLOV)
def test_no_more_than_max_steps_are_taken(name: str, most: int) -> None:
    matrix, b = spectrum(*torch.linspace(1, 50, N).tolist()), normal(5, N, seed=9)
    found = KRYLOV[name](max_steps=most).solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.MAX_STEPS] * 5
    assert found.steps.tolist() == [most] * 5
    torch.testing.assert_close(found.residual, true_residual(matrix, b, found.value))
    if name != "CG":  # whose residual may rise while the energy falls
        assert (found.residual <= 1.0).all()


@pytest.mark.parametrize("name", KRYLOV)
def test_residual_that_can_fall_no_further_is_stalled(name: str) -> None:
    condition = 1e9
    values = torch.logspace(0, float(np.log10(condition)), N, dtype=DOUBLE).tolist()
    matrix, b = spectrum(*values), normal(5, N, seed=9)
    found = KRYLOV[name](max_steps=5000).solve(Dense(matrix), b, EPSILON)
    assert found.status.tolist() == [ti.Status.STALLED] * 5
    assert (found.steps < 5000).all()
    actual = true_residual(matrix, b, found.value)
    torch.testing.assert_close(found.residual, actual, rtol=1e-6, atol=0)
    assert actual.max() <= 1e-3


# --- QR


def _deficient(rank: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return (normal(5, N, rank, seed=10) @ normal(5, rank, N, seed=11)).to(dtype)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [0, 1, N // 2, N - 1])
def test_qr_gives_a_singular_system_the_least_squares_solution_of_least_norm(rank: int, dtype: torch.dtype) -> None:
    matrix, b = _deficient(rank, dtype), normal(5, N, seed=12).to(dtype)
    found = QR().solve(Dense(matrix), b, 1e-6)
    assert found.status.tolist() == [ti.Status.STALLED] * 5
    assert not found.solved
    for i in range(5):
        cutoff = N * torch.finfo(dtype).eps
        expected = scipy.linalg.lstsq(matrix[i].double().numpy(), b[i].double().numpy(), cond=cutoff)[0]
        tolerance = 1e-10 if dtype == DOUBLE else 1e-2
        error = (found.value[i].double() - torch.from_numpy(expected)).norm()
        assert error <= tolerance * max(np.linalg.norm(expected), 1e-300)
    # The residual of least squares is orthogonal to the range.
    rest = b - torch.einsum("bij,bj->bi", matrix, found.value)
    gradient = torch.einsum("bij,bi->bj", matrix, rest)
    assert gradient.norm(dim=1).max() <= 100 * torch.finfo(dtype).eps * matrix.norm(dim=(1, 2)).max() * b.norm()
    torch.testing.assert_close(found.residual, rest.norm(dim=1) / b.norm(dim=1))


@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150, 1e-300])
@pytest.mark.parametrize("rank", [1, N // 2, N - 1])
def test_qr_solves_a_singular_system_that_has_a_solution(rank: int, scale: float) -> None:
    matrix = _deficient(rank)
    x = torch.einsum("bji,bj->bi", matrix, normal(5, N, seed=13))  # in the row space: of least norm
    b = torch.einsum("bij,bj->bi", matrix, x)
    found = QR().solve(Dense(matrix * scale), b * (scale if scale > 1e-200 else 1.0), 0.0)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert found.residual.max() <= 10 * N * EPSILON
    torch.testing.assert_close(found.value * (scale if scale <= 1e-200 else 1.0), x, rtol=1e-9, atol=1e-9)


def test_qr_sees_a_singular_matrix_that_no_diagonal_shows() -> None:
    # Ones on the diagonal, −1 above: regular in exact arithmetic, but within 2⁻⁵⁸ of singular (Kahan 1966).
    n = 60
    matrix = (torch.eye(n, dtype=DOUBLE) - torch.ones(n, n, dtype=DOUBLE).triu(1))[None]
    b = normal(1, n, seed=14)
    found = QR().solve(Dense(matrix), b, RTOL)
    expected = scipy.linalg.lstsq(matrix[0].numpy(), b[0].numpy(), cond=n * EPSILON)[0]
    assert found.status.item() == ti.Status.STALLED
    torch.testing.assert_close(found.value[0], torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("smallest, rank", [(1e-12, N), (1e-14, N), (1e-15, N - 1), (1e-18, N - 1)])
def test_qr_decides_the_rank_relative_to_the_largest_singular_value(smallest: float, rank: int) -> None:
    u, v = orthogonal(1, N, seed=15), orthogonal(1, N, seed=16)
    values = torch.cat([torch.linspace(2.0, 1.0, N - 1, dtype=DOUBLE), torch.tensor([2.0 * smallest], dtype=DOUBLE)])
    for units in (1.0, 1e6):
        found = QR().solve(Dense(units * u * values @ v.mT), units * u[:, :, -1], 1e-3)
        # b is the last left singular vector: x is 1/σ times the last right one, or 0.
        norm = found.value.norm().item()
        if rank == N:
            assert norm == pytest.approx(1 / (2 * smallest), rel=0.2 if smallest < 1e-13 else 1e-2)
        else:
            assert norm < 1.0
            assert found.status.item() == ti.Status.STALLED
            assert found.residual.item() == pytest.approx(1.0)


def test_qr_takes_the_singular_samples_apart_and_leaves_the_others_as_they_are_alone() -> None:
    matrix, b = contraction(0.8), normal(5, N, seed=9)
    alone = QR().solve(Dense(matrix), b, RTOL)
    matrix[1] = _deficient(3)[1]
    matrix[3] = torch.nan
    found = QR().solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [0, ti.Status.STALLED, 0, ti.Status.NONFINITE, 0]
    assert found.residual[3].item() == torch.inf
    assert found.value[3].count_nonzero() == 0
    torch.testing.assert_close(found.value[[0, 2, 4]], alone.value[[0, 2, 4]], rtol=0, atol=0)


def test_newton_goes_through_a_singular_jacobian_by_least_squares() -> None:
    # fn's Jacobian at the start has rank one, and its range does not contain fn there.
    def fn(z: Tensor) -> Tensor:
        return torch.stack([z[..., 0] ** 2 + z[..., 1] - 3.0, z[..., 0] + z[..., 1] ** 2 - 5.0], dim=-1)

    start = torch.tensor([[0.5, 0.5], [1.0, 1.5]], dtype=DOUBLE)
    assert torch.linalg.matrix_rank(torch.tensor([[2 * 0.5, 1.0], [1.0, 2 * 0.5]])) == 1
    statuses = {}
    for solver in (LU(), QR()):
        newton = ti.Newton(linear_solver=solver, rtol=1e-13)
        sol = ti.root(fn, start, solver=newton, batch_dims=1, on_failure="ignore")
        statuses[type(solver).__name__] = sol.status.tolist()
    assert statuses == {"LU": [ti.Status.SINGULAR, 0], "QR": [0, 0]}
    torch.testing.assert_close(fn(sol.value), torch.zeros(2, 2, dtype=DOUBLE), rtol=0, atol=1e-10)


def test_adjoint_by_qr_has_a_gradient_exactly_where_the_system_has_a_solution() -> None:
    # z = J z + c with eigenvalue 1: the direction q is free. A gradient exists for losses that do not see q.
    q = orthogonal(1, 8, seed=17)[0]
    jacobian = q * torch.cat([torch.linspace(-0.5, 0.5, 7, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)]) @ q.T
    weights = torch.stack([q[:, :7] @ normal(7, seed=18), q[:, 7]])
    c = ((torch.eye(8, dtype=DOUBLE) - jacobian) @ normal(8, seed=19)).expand(2, 8).clone().requires_grad_()
    adjoint = ti.Implicit(linear_solver=QR())
    sol = ti.fixed_point(
        lambda z: z @ jacobian.T + c,
        torch.zeros(2, 8, dtype=DOUBLE),
        batch_dims=1,
        solver=ti.Picard(),
        adjoint=adjoint,
        on_failure="ignore",
    )
    sol.value.backward(weights)
    assert sol.adjoint.status is not None
    assert sol.adjoint.status.tolist() == [ti.Status.CONVERGED, ti.Status.STALLED]
    expected = weights @ torch.linalg.pinv(torch.eye(8, dtype=DOUBLE) - jacobian)
    assert c.grad is not None
    torch.testing.assert_close(c.grad[0], expected[0], rtol=1e-9, atol=1e-9)
    assert c.grad[1].count_nonzero() == 0


# --- Preconditioners


def _scaled(name: str) -> Tensor:
    """Equations, or for CG equations and unknowns, in units from 1 to 10⁴."""
    units = torch.logspace(0, 4, N, dtype=DOUBLE)
    return units[:, None] * contraction(0.3) if name != "CG" else (units[:, None] * definite(0.5) * units)


@pytest.mark.parametrize("name", KRYLOV)
def test_jacobi_undoes_the_units_of_equations(name: str) -> None:
    matrix, b = _scaled(name), normal(5, N, seed=9)
    plain = KRYLOV[name](restart=5).solve(Dense(matrix), b, RTOL) if name == "GMRES" else None
    plain = plain or KRYLOV[name]().solve(Dense(matrix), b, RTOL)
    option = {"restart": 5} if name == "GMRES" else {}
    found = KRYLOV[name](preconditioner=Jacobi(), **option).solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert true_residual(matrix, b, found.value).max() <= RTOL
    assert (found.steps < plain.steps).all()
    if name == "CG":  # of the scaled matrix
        assert (found.steps <= N + 2).all()


@pytest.mark.parametrize("name", KRYLOV)
def test_exact_inverse_as_preconditioner_takes_one_step(name: str) -> None:
    matrix, b = suited(name, 0.9), normal(5, N, seed=9)
    built = []

    def inverse(operator: Any) -> Callable[[Tensor], Tensor]:
        built.append(operator)
        factors = torch.linalg.inv(operator.dense())
        return lambda p: torch.einsum("bij,bj->bi", factors, p)

    operator = Dense(matrix)
    found = KRYLOV[name](preconditioner=inverse).solve(operator, b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert found.steps.tolist() == [1] * 5
    assert built == [operator]
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["GMRES", "BiCGStab"])
def test_preconditioned_residuals_are_those_of_the_system(name: str) -> None:
    matrix, b = _scaled(name), normal(5, N, seed=9)
    for rtol in (1e-1, 1e-3):
        found = KRYLOV[name](preconditioner=Jacobi()).solve(Dense(matrix), b, rtol, verify=False)
        assert found.status.tolist() == [ti.Status.CONVERGED] * 5
        actual = true_residual(matrix, b, found.value)
        torch.testing.assert_close(found.residual, actual, rtol=1e-6, atol=1e-12)
        assert (actual <= rtol).all()


def test_gmres_takes_a_preconditioner_that_changes_from_step_to_step() -> None:
    matrix, b = contraction(0.9), normal(5, N, seed=9)
    calls = []

    def changing(operator: Any) -> Callable[[Tensor], Tensor]:
        def apply(p: Tensor) -> Tensor:
            calls.append(None)
            return p * (1 + 0.5 * torch.sin(torch.arange(N, dtype=DOUBLE) * len(calls)))

        return apply

    found = GMRES(preconditioner=changing).solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert true_residual(matrix, b, found.value).max() <= RTOL
    assert found.steps.max() <= N


def test_cg_calls_singular_a_preconditioner_that_is_not_positive_definite() -> None:
    found = CG(preconditioner=lambda _: torch.neg).solve(Dense(definite(0.5)), normal(5, N, seed=9), RTOL)
    assert found.status.tolist() == [ti.Status.SINGULAR] * 5


def test_jacobi_takes_a_zero_on_the_diagonal_for_one() -> None:
    matrix = torch.tensor([[[0.0, 2.0], [1.0, 4.0]]], dtype=DOUBLE)
    apply = Jacobi()(Dense(matrix))
    assert apply(torch.ones(1, 2, dtype=DOUBLE)).tolist() == [[1.0, 0.25]]


def test_jacobi_prefers_the_diagonal_that_an_operator_has() -> None:
    class Known(Dense):
        def diagonal(self) -> Tensor:
            return torch.full((1, 2), 8.0, dtype=DOUBLE)

        def dense(self) -> Tensor:
            raise AssertionError

    apply = Jacobi()(Known(torch.eye(2, dtype=DOUBLE)[None]))
    assert apply(torch.ones(1, 2, dtype=DOUBLE)).tolist() == [[0.125, 0.125]]


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_diagonal_of_a_jacobian_is_that_of_its_matrix(own: bool, shifted: bool) -> None:
    class Slope:
        def __init__(self, slope: Tensor) -> None:
            self.slope = slope

        def dense(self) -> Tensor:
            return torch.diag_embed(self.slope) + 1.0

    if own:
        Slope.diagonal = lambda self: self.slope + 1.0  # type: ignore[attr-defined]
    z = normal(3, 4, seed=20)
    automatic = AutogradJacobian.at(lambda z: torch.sin(z) + z.sum(1, keepdim=True), z, lambda _: None)
    supplied = SuppliedJacobian(Slope(torch.cos(z)), z.shape, (3, 4), lambda _: None)
    for jacobian in (automatic, supplied):
        operator = ResidualJacobian(jacobian, shifted)
        expected = operator.dense().diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(operator.diagonal(), expected, rtol=0, atol=1e-14)
        part = operator.select(torch.tensor([2, 0]))
        torch.testing.assert_close(part.diagonal(), expected[[2, 0]], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [GMRES, BiCGStab, CG])
def test_preconditioner_that_is_none_is_refused(kind: Callable[..., LinearSolver]) -> None:
    for wrong in (torch.eye(3), "jacobi", 1.0):
        with pytest.raises(ValueError, match=r"(?s)preconditioner=.*Jacobi\(\)"):
            kind(preconditioner=wrong)
    with pytest.raises(ValueError, match=r"(?s)preconditioner=.*Jacobi\(\)"):
        kind(preconditioner=Jacobi)
    with pytest.raises(TypeError, match="did you mean 'preconditioner'"):
        kind(precondtioner=None)
    with pytest.raises(ValueError, match="max_steps=0"):
        kind(max_steps=0)
    operator, b = Dense(definite(0.5)), normal(5, N)
    with pytest.raises(TypeError, match="must return a callable"):
        kind(preconditioner=lambda _: torch.eye(N)).solve(operator, b, RTOL)
    with pytest.raises(ValueError, match=r"p is \(5, 12\).* M⁻¹p is \(12,\)"):
        kind(preconditioner=lambda _: lambda p: p[0]).solve(operator, b, RTOL)


# --- Samples that leave the batch


class Watched(Dense):
    """Notes how many samples each product was taken of."""

    def __init__(self, matrix: Tensor, rows: list[int]) -> None:
        super().__init__(matrix)
        self.rows = rows

    def mv(self, p: Tensor) -> Tensor:
        assert p.shape[0] == self.matrix.shape[0]
        self.rows.append(p.shape[0])
        return super().mv(p)

    def select(self, samples: Tensor) -> "Watched":
        return Watched(self.matrix[samples], self.rows)


def _uneven(name: str) -> Tensor:
    """From a multiple of the identity to a matrix that takes many steps."""
    spread = torch.linspace(0.0, 0.95, 8, dtype=DOUBLE).tolist()
    return torch.stack([suited(name, r, 1)[0] for r in spread])


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", KRYLOV)
def test_samples_that_are_done_leave_the_batch(name: str, preconditioned: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(_krylov, "_WORTHWHILE", 0)
    matrix, b, rows = _uneven(name), normal(8, N, seed=9), []
    option: dict[str, Any] = {"restart": 6, "max_steps": 500} if name == "GMRES" else {}
    solver = KRYLOV[name](preconditioner=Jacobi() if preconditioned else None, **option)
    rtol = torch.logspace(-1, -12, 8, dtype=DOUBLE)
    found = solver.solve(Watched(matrix, rows), b, rtol)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 8
    assert (true_residual(matrix, b, found.value) <= rtol).all()
    assert rows[0] == 8
    assert min(rows) <= 4
    monkeypatch.setattr(_krylov, "_WORTHWHILE", 10**9)
    whole = solver.solve(Watched(matrix, rows := []), b, rtol)
    assert set(rows) == {8}
    torch.testing.assert_close(found.value, whole.value, rtol=1e-12, atol=1e-12)
    assert found.steps.tolist() == whole.steps.tolist()


@pytest.mark.parametrize("name", KRYLOV)
def test_samples_stay_with_a_preconditioner_that_cannot_be_split(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(_krylov, "_WORTHWHILE", 0)
    matrix, b, rows = _uneven(name), normal(8, N, seed=9), []
    factors = 1 / matrix.diagonal(dim1=1, dim2=2)
    solver = KRYLOV[name](preconditioner=lambda _: lambda p: p * factors)
    found = solver.solve(Watched(matrix, rows), b, torch.logspace(-1, -12, 8, dtype=DOUBLE))
    assert found.status.tolist() == [ti.Status.CONVERGED] * 8
    assert set(rows) == {8}


def test_dense_solvers_and_cascade_form_only_what_is_needed() -> None:
    class Selected(Dense):
        def dense(self) -> Tensor:
            formed.append(self.matrix.shape[0])
            return self.matrix

        def select(self, samples: Tensor) -> "Selected":
            return Selected(self.matrix[samples])

    b = normal(5, N, seed=9)
    b[[1, 3]] = 0.0
    for solver in (LU(), QR()):
        formed: list[int] = []
        found = solver.solve(Selected(contraction(0.5)), b, RTOL)
        torch.testing.assert_close(found.value, torch.linalg.solve(contraction(0.5), b), rtol=1e-12, atol=1e-12)
        assert formed == [3]
        assert solver.solve(Selected(contraction(0.5)), torch.zeros_like(b), RTOL).value.count_nonzero() == 0
        assert formed == [3]
    # Neumann solves the first, GMRES(2) the next two; the shifts are left to LU.
    shift = torch.roll(torch.eye(N, dtype=DOUBLE), 1, 0)
    matrix = torch.stack([contraction(0.2)[0], 3 * definite(0.0)[0], -definite(0.0)[0], shift, -shift])
    formed = []
    b = torch.eye(N, dtype=DOUBLE)[:5]
    found = Cascade(small=0, gmres=GMRES(restart=2)).solve(Selected(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert formed == [2]
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(
    n=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(KRYLOV)),
    preconditioned=st.booleans(),
    worthwhile=st.sampled_from([0, 10**9]),
    bad=st.sampled_from(["none", "nan", "zero", "rank one"]),
)
def test_sample_has_the_same_solution_alone_and_among_any_others(
    n: int, seed: int, name: str, preconditioned: bool, worthwhile: int, bad: str
) -> None:
    noise, b = 0.05 * normal(6, n, n, seed=seed), normal(6, n, seed=seed)
    matrix = torch.cat([suited(name, r, 1, n) for r in (0.0, 0.1, 0.3, 0.7, 0.7, 0.7)])
    matrix = matrix + (noise @ noise.mT if name == "CG" else noise)
    if bad != "none":
        matrix[3] = {"nan": torch.nan, "zero": 0.0, "rank one": 1.0}[bad]
    solver = KRYLOV[name](preconditioner=Jacobi() if preconditioned else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_krylov, "_WORTHWHILE", worthwhile)
        found = solver.solve(Dense(matrix), b, RTOL)
        assert found.value.isfinite().all()
        for i in range(6):
            alone = solver.solve(Dense(matrix[i : i + 1]), b[i : i + 1], RTOL)
            if i == 3 and bad == "rank one" and n > 1:  # how it fails is a matter of rounding
                assert found.status[i] != ti.Status.CONVERGED
                continue
            assert found.status[i] == alone.status[0]
            assert found.steps[i] == alone.steps[0]
            if found.status[i] == ti.Status.CONVERGED:
                torch.testing.assert_close(found.value[i], alone.value[0], atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(found.residual[i], alone.residual[0], atol=1e-12, rtol=1e-6)


# --- The frame of cycles


def test_each_sample_has_its_own_count_of_steps(worthwhile: int) -> None:
    """A stub that takes `i + 1` steps of sample `i` per cycle, each of which halves the residual."""
    limits = []

    def cycle(rows: _krylov.Rows, length: int, earlier: int) -> None:
        active = rows.norm > rows.target
        # The size of the matrix says which sample it is.
        which = rows.operator.dense()[:, 0, 0]
        most = torch.full_like(which, length) if rows.limit is None else rows.limit.double()
        taken = torch.where(active, torch.minimum(which, most), 0.0)
        limits.append((earlier, length, rows.limit is None))
        rows.steps = rows.steps + taken.long()
        rows.residual = rows.residual * 0.5 ** taken[:, None]
        rows.norm = rows.residual.norm(dim=1)

    which = torch.arange(1.0, 5.0, dtype=DOUBLE)
    operator = Dense(which[:, None, None].expand(4, 1, 1))
    found = _krylov.solve_in_cycles(
        cycle, operator, torch.ones(4, 1, dtype=DOUBLE), 0.5**9, False, max_steps=7, preconditioner=None
    )
    # 9 halvings are needed and 7 allowed: nobody gets more or less for the company it is in.
    assert found.steps.tolist() == [7, 7, 7, 7]
    assert found.residual.tolist() == [0.5**7] * 4
    assert found.status.tolist() == [ti.Status.MAX_STEPS] * 4
    assert limits[0] == (0, 7, True)
    assert limits[1] == (1, 6, False)


class Settling(Dense):
    """Wrong in the fifth digit for the first four products."""

    def mv(self, p: Tensor) -> Tensor:
        exact = super().mv(p)
        return exact if self.products > 4 else exact * (1 + 1e-5 * torch.cos(torch.arange(N, dtype=DOUBLE)))


@pytest.mark.parametrize("name", KRYLOV)
def test_second_cycle_takes_of_each_sample_only_the_steps_that_it_has_left(name: str) -> None:
    values = torch.linspace(0.5, 1.5, N, dtype=DOUBLE)
    matrix = torch.stack([torch.eye(N, dtype=DOUBLE), torch.diag(values)])
    b = normal(2, N, seed=9)
    enough = KRYLOV[name]().solve(Settling(matrix), b, RTOL)
    first = KRYLOV[name]().solve(Settling(matrix), b, RTOL, verify=False)
    assert enough.status.tolist() == [0, 0]
    assert (enough.steps > first.steps).all()
    most = int(enough.steps[1]) - 1
    assert most > first.steps[1]
    found = KRYLOV[name](max_steps=most).solve(Settling(matrix), b, RTOL)
    assert found.status.tolist() == [0, ti.Status.MAX_STEPS]
    assert found.steps.tolist() == [enough.steps[0].item(), most]


@pytest.mark.parametrize("name", KRYLOV)
def test_recurrence_that_lies_is_found_out_and_goes_on_from_the_true_residual(name: str) -> None:
    matrix, b = suited(name, 0.5), normal(5, N, seed=9)
    trusted = KRYLOV[name]().solve(Settling(matrix), b, RTOL, verify=False)
    assert trusted.status.tolist() == [ti.Status.CONVERGED] * 5
    assert true_residual(matrix, b, trusted.value).min() > 1e-7
    found = KRYLOV[name]().solve(Settling(matrix), b, RTOL)
    assert found.status.tolist() == [ti.Status.CONVERGED] * 5
    assert true_residual(matrix, b, found.value).max() <= RTOL
    assert (found.steps > trusted.steps).all()


@pytest.mark.parametrize("scale", [1e150, 1e-150])
@pytest.mark.parametrize("name", ["LU", "QR", *KRYLOV])
def test_solvers_work_over_the_range_of_the_dtype(name: str, scale: float) -> None:
    kinds: dict[str, Callable[..., LinearSolver]] = {"LU": LU, "QR": QR, **KRYLOV}
    matrix, b = suited(name, 0.7), normal(5, N, seed=9)
    x = torch.linalg.solve(matrix, b)
    for left, right in ((scale, 1.0), (1.0, scale), (scale, scale), (scale, 1 / scale)):
        found = kinds[name]().solve(Dense(matrix * left), b * right, RTOL)
        assert found.status.tolist() == [ti.Status.CONVERGED] * 5
        torch.testing.assert_close(found.value * left / right, x, rtol=1e-8, atol=1e-8)
        assert (found.residual <= RTOL).all()


@pytest.mark.parametrize("name", ["LU", "QR", *KRYLOV])
def test_solution_beyond_the_range_of_the_dtype_is_not_finite(name: str) -> None:
    kinds: dict[str, Callable[..., LinearSolver]] = {"LU": LU, "QR": QR, **KRYLOV}
    matrix, b = suited(name, 0.7), normal(5, N, seed=9)
    matrix[2] *= 1e-150
    b[2] *= 1e200
    found = kinds[name]().solve(Dense(matrix), b, RTOL)
    assert found.status.tolist() == [0, 0, ti.Status.NONFINITE, 0, 0]
    assert found.value.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LU", "QR", *KRYLOV])
def test_solvers_give_the_same_on_a_gpu(name: str) -> None:
    kinds: dict[str, Callable[..., LinearSolver]] = {"LU": LU, "QR": QR, **KRYLOV}
    matrix, b = suited(name, 0.7), normal(5, N, seed=9)
    matrix[2] = 0.0
    matrix[4] = torch.nan
    here = kinds[name]().solve(Dense(matrix), b, RTOL)
    there = kinds[name]().solve(Dense(matrix.cuda()), b.cuda(), RTOL)
    assert here.status.tolist() == there.status.tolist()
    torch.testing.assert_close(there.value.cpu(), here.value, rtol=1e-8, atol=1e-8)


# --- The same through the gradient of a layer


class _Symmetric:
    """`z = Wᵀ tanh(W z + b)/2 + x`, a gradient step: its Jacobian is symmetric, and `I − J` positive definite."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        weight = normal(7, 6, seed=21)
        weight = weight * 1.2 / torch.linalg.matrix_norm(weight, 2)
        self.weight = weight.to(dtype).requires_grad_()
        self.bias = (0.1 * normal(7, seed=22)).to(dtype).requires_grad_()
        self.x = normal(5, 6, seed=23).to(dtype).requires_grad_()

    def __call__(self, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(z @ self.weight.T + self.bias) @ self.weight + self.x


ADJOINTS: dict[str, LinearSolver] = {
    "QR": QR(),
    "GMRES": GMRES(),
    "BiCGStab": BiCGStab(),
    "CG": CG(),
    "GMRES-Jacobi": GMRES(preconditioner=Jacobi()),
    "BiCGStab-Jacobi": BiCGStab(preconditioner=Jacobi()),
    "CG-Jacobi": CG(preconditioner=Jacobi()),
    "Cascade": Cascade(small=0, gmres=GMRES(preconditioner=Jacobi())),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradient_by_every_linear_solver_is_that_by_lu(name: str, worthwhile: int) -> None:
    problem = _Symmetric()
    found = []
    for linear in (LU(), ADJOINTS[name]):
        sol = ti.fixed_point(
            problem,
            torch.zeros(5, 6, dtype=DOUBLE),
            solver=ti.Newton(linear_solver=linear, rtol=1e-13),
            adjoint=ti.Implicit(linear_solver=linear, rtol=1e-13),
            batch_dims=1,
        )
        found.append(gradients(sol.value, [problem.weight, problem.bias, problem.x]))
        assert sol.adjoint.status is not None
        assert sol.adjoint.status.tolist() == [ti.Status.CONVERGED] * 5
    for ours, truth in zip(*found, strict=True):
        assert truth.abs().max() > 0.1
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [GMRES, BiCGStab, QR])
def test_gradient_of_an_unsymmetric_layer_is_that_by_lu(kind: Callable[..., LinearSolver]) -> None:
    layer = ti.nn.TanhEquilibrium(9, dtype=DOUBLE, solver=ti.Newton(rtol=1e-13))
    x = normal(4, 9, seed=24).requires_grad_()
    seen: list[ResidualJacobian] = []

    def inverse(operator: ResidualJacobian) -> Callable[[Tensor], Tensor]:
        seen.append(operator)
        factors = torch.linalg.inv(operator.dense())
        return lambda p: torch.einsum("bij,bj->bi", factors, p)

    found = []
    options: list[LinearSolver] = [LU(), kind()]
    if kind is not QR:
        options.append(kind(preconditioner=inverse))
    for linear in options:
        layer.adjoint = ti.Implicit(linear_solver=linear, rtol=1e-13)
        solution = layer.solve(x)
        found.append(gradients(solution.value, [x, layer.linear.weight]))
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], rtol=1e-9, atol=1e-9)
    # The preconditioner of the adjoint system is built from its own matrix, the transpose.
    if kind is not QR:
        assert [operator.transposed for operator in seen] == [True]
        assert solution.adjoint.steps is not None
        assert solution.adjoint.steps.tolist() == [1] * 4


def test_cg_that_cannot_solve_the_adjoint_gives_a_zero_gradient_and_says_why() -> None:
    weight = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=DOUBLE)  # I − J has the eigenvalues −2 and 4
    x = torch.zeros(2, 2, dtype=DOUBLE)
    x[1] = torch.tensor([30.0, 30.0])  # saturated: J is nearly zero
    x.requires_grad_()
    sol = ti.fixed_point(
        lambda z: torch.tanh(z @ weight + x),
        torch.zeros(2, 2, dtype=DOUBLE),
        solver=ti.Newton(),
        adjoint=ti.Implicit(linear_solver=CG()),
        batch_dims=1,
        on_failure="ignore",
    )
    assert sol.converged.all()
    sol.value.backward(torch.tensor([[1.0, -0.5], [1.0, -0.5]], dtype=DOUBLE))
    assert sol.adjoint.status is not None
    assert sol.adjoint.status.tolist() == [ti.Status.SINGULAR, ti.Status.CONVERGED]
    assert x.grad is not None
    assert x.grad[0].count_nonzero() == 0
