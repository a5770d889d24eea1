"""The quadratic-program layer: solutions against SciPy and closed forms, gradients, and the flags of what has none."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.nn import QP, _qp_gradient
from torchimplicit.nn._qp_newton import Condensed
from torchimplicit.nn._qp_program import Program, sizes

Data = list[Tensor]


def random_programs(batch: int, n: int, m: int, k: int, seed: int = 0) -> Data:
    """Strongly convex and feasible; about half of the constraints active at the solution."""
    torch.manual_seed(seed)
    L = torch.randn(batch, n, n, dtype=torch.float64)
    z = torch.randn(batch, n, dtype=torch.float64)
    G = torch.randn(batch, m, n, dtype=torch.float64)
    A = torch.randn(batch, k, n, dtype=torch.float64)
    h = (G @ z[..., None])[..., 0] + torch.rand(batch, m, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    return [L @ L.mT / n + 0.1 * eye, torch.randn_like(z), G, h, A, (A @ z[..., None])[..., 0]]


def test_solutions_agree_with_scipy() -> None:
    data = random_programs(10, 6, 8, 2)
    solution = QP().solve(*data)
    assert solution.converged.all()
    for i in range(10):
        Q, p, G, h, A, b = (t[i].numpy() for t in data)
        reference = scipy.optimize.minimize(
            lambda z, Q=Q, p=p: 0.5 * z @ Q @ z + p @ z,
            np.zeros(6),
            jac=lambda z, Q=Q, p=p: Q @ z + p,
            constraints=[
                {"type": "ineq", "fun": lambda z, G=G, h=h: h - G @ z, "jac": lambda z, G=G: -G},
                {"type": "eq", "fun": lambda z, A=A, b=b: A @ z - b, "jac": lambda z, A=A: A},
            ],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert np.abs(solution.value[i].numpy() - reference.x).max() < 1e-6


def kkt(data: Data, solution: ti.nn.QPSolution) -> Tensor:
    """The largest violation of each sample's optimality conditions, computed afresh, `(B,)`."""
    Q, p, G, h, A, b = data
    z, lam, nu = solution.value, solution.inequality_multipliers, solution.equality_multipliers
    slack = h - (G @ z[..., None])[..., 0]
    parts = [
        (Q @ z[..., None] + G.mT @ lam[..., None] + A.mT @ nu[..., None])[..., 0] + p,
        slack.clamp(max=0.0),
        lam.clamp(max=0.0),
        lam * slack,
        (A @ z[..., None])[..., 0] - b,
    ]
    return torch.cat(parts, dim=-1).abs().amax(-1)


@pytest.mark.parametrize("n, m, k", [(50, 50, 0), (50, 50, 10), (10, 60, 3), (30, 0, 5), (20, 10, 0), (5, 0, 0)])
def test_the_optimality_conditions_hold(n: int, m: int, k: int) -> None:
    data = random_programs(40, n, m, k)
    solution = QP().solve(*data)
    assert solution.converged.all()
    assert kkt(data, solution).max() < 1e-7
    assert not (solution.infeasible | solution.unbounded | solution.nonconvex).any()


def test_a_projection_onto_a_box_has_its_closed_form_and_gradient() -> None:
    y = (3 * torch.randn(50, 20, dtype=torch.float64)).requires_grad_()
    eye = torch.eye(20, dtype=torch.float64)
    z = QP()(eye, -y, torch.cat([eye, -eye]), torch.ones(40, dtype=torch.float64))
    assert (z - y.clamp(-1, 1)).abs().max() < 1e-7
    weight = torch.randn_like(y)
    (weight * z).sum().backward()
    # Where y is within 1e-4 of a bound rounding decides on which side it is.
    clear = (y.detach().abs() - 1).abs() > 1e-4
    assert y.grad is not None
    assert ((y.grad - weight * (y.detach().abs() < 1)) * clear).abs().max() < 1e-6


def test_without_inequalities_it_is_a_linear_system_and_so_are_its_derivatives() -> None:
    Q, p, _, _, A, b = random_programs(5, 6, 0, 2)
    p.requires_grad_()
    solution = QP().solve(Q, p, A=A, b=b)
    matrix = torch.cat([torch.cat([Q, A.mT], 2), torch.cat([A, torch.zeros(5, 2, 2, dtype=Q.dtype)], 2)], 1)
    exact = torch.linalg.solve(matrix, torch.cat([-p, b], 1))
    assert (solution.value - exact[:, :6]).abs().max() < 1e-10
    weight = torch.randn(5, 6, dtype=Q.dtype)
    (mine,) = torch.autograd.grad((weight * solution.value).sum(), p)
    (theirs,) = torch.autograd.grad((weight * exact[:, :6]).sum(), p)
    assert (mine - theirs).abs().max() < 1e-10


def everything(*data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    solution = QP(rtol=1e-13).solve(*data)
    return solution.value, solution.inequality_multipliers, solution.equality_multipliers


def test_first_and_second_derivatives_of_everything_agree_with_finite_differences() -> None:
    data = [t.requires_grad_() for t in random_programs(1, 3, 4, 1, seed=2)]
    assert torch.autograd.gradcheck(everything, data, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(lambda *d: everything(*d)[0], data, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("k", [0, 5])
def test_large_programs_end_early_and_have_the_gradient_of_finite_differences(k: int) -> None:
    data = random_programs(200, 50, 50, k, seed=3)
    weight, step = torch.randn(200, 50, dtype=torch.float64), 1e-7
    changes = [torch.randn_like(t) for t in data]
    changes[0] = changes[0] + changes[0].mT
    data = [t.requires_grad_() for t in data]
    solution = QP().solve(*data)
    assert solution.steps.max() < 11  # interior-point steps alone take up to 14
    (weight * solution.value).sum().backward()
    for t, change in zip(data, changes, strict=True):
        moved = [[u + sign * step * change if u is t else u for u in data] for sign in (1, -1)]
        with torch.no_grad():
            one, other = (QP()(*d) for d in moved)
        exact = (weight * (one - other)).sum(1) / (2 * step)
        assert t.grad is not None
        mine = (t.grad * change).flatten(1).sum(1)
        assert ((mine - exact).abs() <= 1e-6 * exact.abs().max()).all()


def test_the_whole_system_has_the_same_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qp_gradient, "refined", lambda of, s, lam, right: tuple(t.detach() * torch.nan for t in right))
    test_first_and_second_derivatives_of_everything_agree_with_finite_differences()


def test_constraints_given_twice_share_their_gradient() -> None:
    Q, p, G, h, _, _ = random_programs(20, 10, 15, 0)
    found = []
    for times in (1, 2):
        data = [t.clone().requires_grad_() for t in (Q, p, G, h)]
        solution = QP().solve(data[0], data[1], torch.cat([data[2]] * times, 1), torch.cat([data[3]] * times, 1))
        solution.value.square().sum().backward()
        assert (solution.adjoint.status == ti.Status.CONVERGED).all()  # type: ignore[union-attr]
        found.append([t.grad for t in data])
    for once, twice in zip(*found, strict=True):
        assert once is not None and twice is not None
        assert (once - twice).abs().max() < 1e-9 * once.abs().max()


def test_rounding_that_makes_the_condensed_matrix_indefinite_is_met_with_lu() -> None:
    Q, p, G, h, A, b = random_programs(3, 4, 5, 0)
    Q[1] -= 40 * torch.eye(4, dtype=Q.dtype)
    p.requires_grad_()
    one = torch.ones_like(h)
    z, lam, *_ = Condensed(Program(Q, p, G, h, A, b, sizes(Q, G, A)), one, one).solve(-p, h, b)
    exact = torch.linalg.solve(Q + G.mT @ G, -p + (G.mT @ h[..., None])[..., 0])
    assert (z - exact).abs().max() < 1e-12 * exact.abs().max()
    assert (lam - ((G @ z[..., None])[..., 0] - h)).abs().max() < 1e-12
    mine, theirs = (torch.autograd.grad(t.square().sum(), p)[0] for t in (z, exact))
    assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_broadcast_data_get_the_sum_of_the_gradients() -> None:
    Q, p, G, h, _, _ = random_programs(6, 4, 5, 0)
    shared = Q[0].clone().requires_grad_()
    z = QP()(shared, p.reshape(2, 3, 4), G[0], h[0])
    assert z.shape == (2, 3, 4)
    z.square().sum().backward()
    total = torch.zeros_like(shared)
    for i in range(6):
        one = Q[0].clone().requires_grad_()
        QP()(one, p[i], G[0], h[0]).square().sum().backward()
        assert one.grad is not None
        total += one.grad
    assert shared.grad is not None
    assert (shared.grad - total).abs().max() < 1e-9


def spoiled() -> tuple[Data, dict[str, int]]:
    """Five good samples, and one of each kind that has no solution; whose place is given."""
    Q, p, G, h, _, _ = random_programs(9, 4, 8, 0)
    G[1, 0], G[1, 1] = G[1, 2], -G[1, 2]
    h[1, 0], h[1, 1] = -1.0, -1.0  # infeasible: a·z ≤ −1 and −a·z ≤ −1
    Q[3] = 0.0
    G[3] = G[3].abs()
    p[3] = 1.0  # unbounded: z → −∞
    Q[5] = -Q[5]
    h[7, 2] = torch.nan
    return [Q, p, G, h], {"infeasible": 1, "unbounded": 3, "nonconvex": 5, "nan": 7}


def test_samples_without_a_solution_are_flagged_have_no_gradient_and_leave_the_others_alone() -> None:
    data, bad = spoiled()
    data = [t.requires_grad_() for t in data]
    solution = QP(on_failure="ignore").solve(*data)
    good = [i for i in range(9) if i not in bad.values()]
    for name in ("infeasible", "unbounded", "nonconvex"):
        assert getattr(solution, name).nonzero()[:, 0].tolist() == [bad[name]]
    assert solution.converged.nonzero()[:, 0].tolist() == good
    assert solution.status[bad["nan"]] == ti.Status.NONFINITE
    assert [int(solution.status[bad[n]]) for n in ("infeasible", "unbounded", "nonconvex")] == [ti.Status.DIVERGED] * 3
    assert solution.value.isfinite().all()
    assert solution.residual[list(bad.values())].min() > 1e-3
    solution.value[good].square().sum().backward(retain_graph=True)
    alone = [t.detach()[good].requires_grad_() for t in data]
    other = QP().solve(*alone)
    other.value.square().sum().backward()
    assert (solution.value[good] - other.value).abs().max() < 1e-12
    for t, one in zip(data, alone, strict=True):
        assert t.grad is not None and one.grad is not None
        assert (t.grad[good] - one.grad).abs().max() < 1e-12
        assert (t.grad[list(bad.values())] == 0).all()


def test_the_gradient_of_a_failed_sample_is_zero_even_if_the_loss_looks_at_it() -> None:
    data, bad = spoiled()
    data = [t.requires_grad_() for t in data]
    QP(on_failure="ignore")(*data).sum().backward()
    for t in data:
        assert t.grad is not None and t.grad.isfinite().all()
        assert (t.grad[list(bad.values())] == 0).all()


def test_second_derivatives_are_finite_beside_failed_samples() -> None:
    data, bad = spoiled()
    data = [t.requires_grad_() for t in data]
    value = QP(on_failure="ignore")(*data)
    first = torch.autograd.grad(value.square().sum(), data[1], create_graph=True)[0]
    first.square().sum().backward()
    for t in data:
        assert t.grad is not None and t.grad.isfinite().all()
        assert (t.grad[list(bad.values())] == 0).all()


def test_failures_warn_or_raise() -> None:
    data, _ = spoiled()
    with pytest.warns(ti.ConvergenceWarning, match="4 of 9 samples"):
        QP()(*data)
    with pytest.raises(ti.ConvergenceError, match="infeasible"):
        QP(on_failure="raise")(*data)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_do_not_matter(scale: float) -> None:
    """z in other units, the objective in others still: the same programs, and the same verdicts."""
    Q, p, G, h = spoiled()[0]
    plain = QP(on_failure="ignore").solve(Q, p, G, h)
    other = QP(on_failure="ignore").solve(1e3 * Q / scale, 1e3 * p, G, h * scale)
    assert (plain.status == other.status).all()
    ok = plain.converged
    assert (other.value[ok] / scale - plain.value[ok]).abs().max() < 1e-6


def test_a_weakly_active_constraint_is_called_degenerate() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for bound, degenerate in ((1.0, True), (1.1, False), (0.9, False)):
        solution = QP().solve(one, -one[0], one, bound * one[0])  # unconstrained minimum: 1
        assert solution.converged.all()
        assert bool(solution.degenerate) is degenerate


def test_a_linear_program_with_many_solutions_has_no_gradient_and_says_so() -> None:
    zero, G = torch.zeros(2, 2, dtype=torch.float64), torch.cat([torch.eye(2), -torch.eye(2)]).double()
    p = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)  # z₁ = −1, z₂ anything in [−1, 1]
    solution = QP(on_failure="ignore").solve(zero, p, G, torch.ones(4, dtype=torch.float64))
    assert solution.converged and abs(solution.value[0] + 1) < 1e-8
    solution.value.sum().backward()
    assert int(solution.adjoint.status) == ti.Status.SINGULAR  # type: ignore[arg-type]
    assert p.grad is not None and (p.grad == 0).all()


def test_a_linear_program_with_one_solution_has_it_and_its_gradient() -> None:
    torch.manual_seed(1)
    G = torch.cat([torch.eye(3), -torch.eye(3), torch.ones(1, 3)]).double()
    h = torch.cat([torch.ones(6), torch.tensor([1.5])]).double().requires_grad_()
    p = torch.tensor([-3.0, -2.0, -1.0], dtype=torch.float64)
    z = QP()(torch.zeros(3, 3, dtype=torch.float64), p, G, h)
    assert (z - torch.tensor([1.0, 1.0, -0.5])).abs().max() < 1e-8
    z[2].backward()  # z₃ = h₇ − h₁ − h₂
    assert h.grad is not None
    assert (h.grad - torch.tensor([-1.0, -1, 0, 0, 0, 0, 1]).double()).abs().max() < 1e-6


def test_float32_reaches_its_own_tolerance() -> None:
    data = random_programs(100, 20, 20, 3)
    exact = QP().solve(*data)
    single = QP().solve(*(t.float() for t in data))
    assert single.converged.all() and single.value.dtype == torch.float32
    assert (single.value - exact.value).abs().max() < 2e-2
    assert (single.value - exact.value).abs().median() < 2e-4


def test_what_is_not_supported_is_refused() -> None:
    Q, p, G, h, A, b = random_programs(3, 4, 5, 1)
    with pytest.raises(RuntimeError, match="not supported"):
        torch.func.vmap(lambda p: QP()(Q[0], p, G[0], h[0]))(p)
    with pytest.raises(RuntimeError, match="not supported"):
        torch.func.jvp(lambda p: QP()(Q, p, G, h), (p,), (p,))
    with pytest.raises(TypeError, match="did you mean 'max_steps'"):
        QP(max_step=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="G and h go together"):
        QP()(Q, p, G)
    with pytest.raises(ValueError, match=r"A must be \(\.\.\., 1, 4\)"):
        QP()(Q, p, G, h, A.mT, b)
    with pytest.raises(TypeError, match="float32"):
        QP()(Q, p.float())
