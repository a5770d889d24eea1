"""The adjoint menu: each within its bound, none poisoned by a failed sample, the solver's inverse put to use."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from benchmarks.maps import Map, maps

DOUBLE = torch.float64
N, BATCH = 24, 5
WITH_INVERSE = {
    "newton": ti.Newton(),
    "chord": ti.Chord(),
    "broyden bad": ti.Broyden(),
    "broyden good": ti.Broyden(update="good"),
    "anderson": ti.Anderson(),
}
GAMMAS = pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])


class Linear:
    """`z = J z + x` with `‖J‖ = γ`, all singular values alike, and the exact gradient for an incoming `v`."""

    def __init__(self, gamma: float, seed: int = 0, n: int = N, dtype: torch.dtype = DOUBLE) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
        self.matrix = (gamma * basis).to(dtype)
        self.x = torch.randn(BATCH, n, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_()
        self.v = torch.randn(BATCH, n, generator=generator, dtype=DOUBLE).to(dtype)
        self.exact = torch.linalg.solve((torch.eye(n, dtype=dtype) - self.matrix).T, self.v.T).T

    def gradient(
        self, adjoint: ti.Adjoint, solver: ti.solvers.Method | None = None, scale: float = 1.0
    ) -> tuple[Tensor, ti.AdjointReport]:
        solution = ti.fixed_point(
            lambda z, x: z @ self.matrix.T + x,
            torch.zeros_like(self.x),
            self.x,
            batch_dims=1,
            solver=solver,
            adjoint=adjoint,
        )
        (found,) = torch.autograd.grad(solution.value, self.x, scale * self.v)
        return found, solution.adjoint

    def error(self, found: Tensor) -> Tensor:
        """Of each sample, relative."""
        return (found - self.exact).norm(dim=1) / self.exact.norm(dim=1)


@GAMMAS
@pytest.mark.parametrize("terms", [0, 1, 2, 5, 20])
def test_neumann_series_is_as_near_as_its_bound_says(gamma: float, terms: int) -> None:
    problem = Linear(gamma)
    found, report = problem.gradient(ti.NeumannSeries(terms))
    # All singular values are alike, so that the bound is attained.
    expected = torch.full((BATCH,), gamma ** (terms + 1), dtype=DOUBLE)
    torch.testing.assert_close(problem.error(found), expected, rtol=1e-6, atol=1e-12)
    assert report.residual is not None
    torch.testing.assert_close(report.residual, expected, rtol=1e-6, atol=1e-12)
    assert report.evaluations == terms + 1


@GAMMAS
def test_jacobian_free_is_as_near_as_its_bound_says(gamma: float) -> None:
    problem = Linear(gamma)
    found, report = problem.gradient(ti.JacobianFree())
    torch.testing.assert_close(found, problem.v)
    torch.testing.assert_close(problem.error(found), torch.full((BATCH,), gamma, dtype=DOUBLE))
    assert report.evaluations == 0


@GAMMAS
@pytest.mark.parametrize("steps, damping", [(1, 1.0), (4, 1.0), (3, 0.5), (10, 0.8)])
def test_phantom_gradient_is_the_unrolled_damped_iteration_and_within_its_bound(
    gamma: float, steps: int, damping: float
) -> None:
    problem = Linear(gamma)
    found, _ = problem.gradient(ti.PhantomGradient(steps, damping))
    assert (problem.error(found) <= (damping * gamma + 1 - damping) ** steps * (1 + 1e-9)).all()
    z = torch.linalg.solve(torch.eye(N, dtype=DOUBLE) - problem.matrix, problem.x.detach().T).T
    for _ in range(steps):
        z = (1 - damping) * z + damping * (z @ problem.matrix.T + problem.x)
    (truth,) = torch.autograd.grad(z, problem.x, problem.v)
    torch.testing.assert_close(found, truth)


@GAMMAS
@pytest.mark.parametrize("solver", WITH_INVERSE.values(), ids=WITH_INVERSE.keys())
def test_shine_comes_nearer_with_every_refinement_and_never_loses_to_nothing(
    gamma: float, solver: ti.solvers.Method
) -> None:
    problem = Linear(gamma)
    residuals = []
    for refine in (0, 2, 5, 40):
        found, report = problem.gradient(ti.Shine(refine), solver)
        assert report.residual is not None
        rest = problem.v - found + found @ problem.matrix
        torch.testing.assert_close(report.residual, rest.norm(dim=1) / problem.v.norm(dim=1), atol=1e-9, rtol=1e-6)
        residuals.append(report.residual)
    assert (residuals[0] <= 1.0 + 1e-12).all() or gamma == 0.9
    for before, after in pairwise(residuals):
        assert (after <= before + 1e-9).all()
    assert (residuals[-1] < 1e-6).all()


@pytest.mark.parametrize("solver", [ti.Newton(), ti.Chord()], ids=["newton", "chord"])
def test_the_factors_of_the_last_newton_step_are_the_exact_inverse_of_a_linear_map(solver: ti.solvers.Method) -> None:
    problem = Linear(0.9)
    found, _ = problem.gradient(ti.Shine(refine=0), solver)
    assert (problem.error(found) < 1e-12).all()


def test_shine_falls_back_where_the_inverse_is_worse_than_none() -> None:
    problem = Linear(0.5)

    class Wrong(ti.Newton):
        def inverse(self, state: object) -> ti.linear.Inverse | None:
            known = super().inverse(state)  # pyright: ignore[reportArgumentType]
            assert isinstance(known, ti.linear.Factors)
            factors = torch.where(torch.arange(BATCH)[:, None, None] == 2, -0.1 * known.factors, known.factors)
            return ti.linear.Factors(factors, known.pivots, known.scaling, known.known)

    found, _ = problem.gradient(ti.Shine(refine=0), Wrong())
    torch.testing.assert_close(found[2], problem.v[2])
    rest = torch.arange(BATCH) != 2
    assert (problem.error(found)[rest] < 1e-12).all()


@pytest.mark.parametrize("solver", [ti.Picard(), ti.NewtonKrylov()], ids=["picard", "newton-krylov"])
def test_shine_without_an_inverse_names_the_solvers_that_have_one(solver: ti.solvers.Method) -> None:
    with pytest.raises(ValueError, match="Broyden"):
        Linear(0.5).gradient(ti.Shine(), solver)


@pytest.mark.parametrize("solver", WITH_INVERSE.values(), ids=WITH_INVERSE.keys())
def test_reuse_solves_the_same_system_with_fewer_products(solver: ti.solvers.Method) -> None:
    problem = Linear(0.9)
    plain, without = problem.gradient(ti.Implicit(), solver)
    reused, report = problem.gradient(ti.Implicit(reuse=True), solver)
    torch.testing.assert_close(reused, problem.exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(plain, problem.exact, rtol=1e-8, atol=1e-8)
    assert report.evaluations is not None
    assert without.evaluations is not None
    assert 2 * report.evaluations <= without.evaluations


def test_reuse_for_a_solver_without_an_inverse_is_the_plain_solve() -> None:
    problem = Linear(0.6)
    found, _ = problem.gradient(ti.Implicit(reuse=True), ti.Picard())
    torch.testing.assert_close(found, problem.gradient(ti.Implicit(), ti.Picard())[0])


@pytest.fixture(scope="module")
def trained() -> Map:
    return next(m for m in maps() if m.name == "trained MNIST")


def _of_trained(problem: Map, adjoint: ti.Adjoint, solver: ti.solvers.Method) -> tuple[Tensor, ti.AdjointReport]:
    x = problem.args[0].detach().requires_grad_()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    solution = ti.fixed_point(problem.fn, problem.z0, x, solver=solver, adjoint=adjoint, batch_dims=1)
    assert solution.converged.all()
    (found,) = torch.autograd.grad(solution.value, x, v)
    return found, solution.adjoint


@pytest.mark.parametrize("solver", [ti.Newton(), ti.Broyden(), ti.Anderson()], ids=["newton", "broyden", "anderson"])
def test_reuse_halves_the_products_on_a_trained_layer(trained: Map, solver: ti.solvers.Method) -> None:
    plain, without = _of_trained(trained, ti.Implicit(), solver)
    reused, report = _of_trained(trained, ti.Implicit(reuse=True), solver)
    assert report.residual is not None
    assert without.residual is not None
    assert report.residual.max() <= 1.05 * max(float(without.residual.max()), torch.finfo(torch.float32).eps ** (2 / 3))
    assert 2 * (report.evaluations or 0) <= (without.evaluations or 0)
    assert (plain - reused).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize("solver", [ti.Newton(), ti.Broyden(), ti.Anderson()], ids=["newton", "broyden", "anderson"])
def test_shine_with_five_refinements_is_the_gradient_of_a_trained_layer(
    trained: Map, solver: ti.solvers.Method
) -> None:
    exact, _ = _of_trained(trained, ti.Implicit(), solver)
    found, _ = _of_trained(trained, ti.Shine(refine=5), solver)
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) >= 0.999


@GAMMAS
def test_unroll_through_picard_and_after_the_solution(gamma: float) -> None:
    problem = Linear(gamma)
    for adjoint in (ti.Unroll(), ti.Unroll(checkpoint=True)):
        found, _ = problem.gradient(adjoint, ti.Picard())
        assert (problem.error(found) < 1e-9).all()
    found, _ = problem.gradient(ti.Unroll(steps=3))
    torch.testing.assert_close(problem.error(found), torch.full((BATCH,), gamma**3, dtype=DOUBLE), rtol=1e-6, atol=0)


def test_unroll_has_the_gradient_of_the_steps_that_were_taken_not_of_the_solution() -> None:
    problem = Linear(0.9)
    solver = ti.Picard(damping=0.7)
    solution = ti.fixed_point(
        lambda z, x: z @ problem.matrix.T + x,
        torch.zeros_like(problem.x),
        problem.x,
        batch_dims=1,
        solver=solver,
        adjoint=ti.Unroll(),
        max_steps=4,
        on_failure="ignore",
    )
    z = torch.zeros_like(problem.x)
    for _ in range(4):
        z = 0.3 * z + 0.7 * (z @ problem.matrix.T + problem.x)
    torch.testing.assert_close(solution.value, z)
    ours = torch.autograd.grad(solution.value, problem.x, problem.v, create_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(z, problem.x, problem.v)[0])


def test_warm_start_saves_products_and_changes_nothing_else() -> None:
    problem = Linear(0.9)
    memory = ti.WarmStart()
    adjoint = ti.Implicit(warm_start=memory)
    cold, first = problem.gradient(adjoint)
    assert first.evaluations is not None
    # Another scale of the loss is no other direction.
    again, second = problem.gradient(adjoint, scale=1e-3)
    assert second.evaluations is not None
    assert second.evaluations <= 3
    torch.testing.assert_close(again, 1e-3 * cold, rtol=1e-8, atol=1e-12)
    problem.v = problem.v + 1e-4 * problem.v.flip(0)
    problem.exact = torch.linalg.solve((torch.eye(N, dtype=DOUBLE) - problem.matrix).T, problem.v.T).T
    near, third = problem.gradient(adjoint)
    assert third.evaluations is not None
    assert third.evaluations < 0.8 * first.evaluations
    assert (problem.error(near) < 1e-9).all()
    assert third.residual is not None
    rest = problem.v - near + near @ problem.matrix
    torch.testing.assert_close(third.residual, rest.norm(dim=1) / problem.v.norm(dim=1), rtol=1e-3, atol=1e-15)
    memory.clear()
    _, fourth = problem.gradient(adjoint)
    assert fourth.evaluations == first.evaluations


def test_warm_start_of_another_batch_or_of_a_failed_sample_is_none() -> None:
    memory = ti.WarmStart()
    adjoint = ti.Implicit(warm_start=memory)
    Linear(0.5, n=5).gradient(adjoint)
    problem = Linear(0.5, n=7)
    assert (problem.error(problem.gradient(adjoint)[0]) < 1e-9).all()
    memory.keep(torch.full((BATCH, 7), torch.nan, dtype=DOUBLE))
    assert (problem.error(problem.gradient(adjoint)[0]) < 1e-9).all()


def test_unroll_needs_plain_steps() -> None:
    with pytest.raises(ValueError, match=r"Picard\(\), or Unroll\(steps=k\)"):
        Linear(0.5).gradient(ti.Unroll(), ti.Anderson())


APPROXIMATE = {
    "neumann": ti.NeumannSeries(3),
    "jacobian-free": ti.JacobianFree(),
    "phantom": ti.PhantomGradient(3, 0.7),
    "shine": ti.Shine(2),
}
MENU = {"implicit": ti.Implicit(), "reuse": ti.Implicit(reuse=True), **APPROXIMATE, "unroll": ti.Unroll(steps=4)}


@pytest.mark.parametrize("adjoint", MENU.values(), ids=MENU.keys())
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
def test_gradients_scale_with_the_loss(adjoint: ti.Adjoint, dtype: torch.dtype) -> None:
    problem = Linear(0.8, dtype=dtype)
    one, _ = problem.gradient(adjoint, ti.Broyden())
    for scale in (1e8, 1e-8):
        many, _ = problem.gradient(adjoint, ti.Broyden(), scale=scale)
        torch.testing.assert_close(many / scale, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize("adjoint", MENU.values(), ids=MENU.keys())
def test_a_poisoned_sample_contributes_exactly_zero_and_leaves_the_others_alone(adjoint: ti.Adjoint) -> None:
    generator = torch.Generator().manual_seed(1)
    n = 6
    weight = torch.randn(n, n, generator=generator, dtype=DOUBLE) * 0.5 / n**0.5
    data = torch.randn(4, n, generator=generator, dtype=DOUBLE)
    v = torch.randn(4, n, generator=generator, dtype=DOUBLE)

    def gradients(data: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, ti.Solution]:
        w = weight.clone().requires_grad_()
        x = data[rows].clone().requires_grad_()
        # A row's products do not depend on the other rows.
        fn = lambda z, x: torch.tanh((z[:, None] * w).sum(2) + torch.sqrt(x * x + 1.0))  # noqa: E731
        solution = ti.fixed_point(
            fn,
            torch.zeros_like(x),
            x,
            batch_dims=1,
            solver=ti.Broyden(rtol=1e-13),
            adjoint=adjoint,
            on_failure="ignore",
        )
        of_w, of_x = torch.autograd.grad(solution.value, (w, x), v[rows])
        return of_w, of_x, solution

    others = [0, 2, 3]
    of_w, of_x, solution = gradients(data.index_fill(0, torch.tensor([1]), torch.nan), [0, 1, 2, 3])
    assert solution.status.tolist() == [0, int(ti.Status.NONFINITE), 0, 0]
    assert torch.equal(of_x[1], torch.zeros_like(of_x[1]))
    w_alone, x_alone, _ = gradients(data, others)
    torch.testing.assert_close(of_w, w_alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_x[others], x_alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", APPROXIMATE.values(), ids=APPROXIMATE.keys())
def test_an_approximate_gradient_has_no_silent_derivative(adjoint: ti.Adjoint) -> None:
    problem = Linear(0.5)

    def solve(x: Tensor) -> Tensor:
        fn = lambda z: 0.5 * torch.sin(z @ problem.matrix.T) + x  # noqa: E731
        z0 = torch.zeros_like(x)
        return ti.fixed_point(fn, z0, batch_dims=1, adjoint=adjoint, solver=ti.Newton()).value.square().sum()

    x = problem.x
    (gradient,) = torch.autograd.grad(solve(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="approximates the first derivative"):
        torch.autograd.grad(gradient.sum(), x)
    with pytest.raises(RuntimeError, match="approximates the first derivative"):
        torch.func.jvp(solve, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(torch.func.grad(solve)(x.detach()), gradient.detach())


@pytest.mark.parametrize("transform", ["grad of grad", "jvp"])
def test_unroll_under_transforms(transform: str) -> None:
    problem = Linear(0.5)

    def value(x: Tensor, adjoint: ti.Adjoint) -> Tensor:
        fn = lambda z: 0.5 * torch.sin(z @ problem.matrix.T) + x  # noqa: E731
        z0 = torch.zeros_like(x)
        solver = ti.Picard(rtol=1e-14)
        return ti.fixed_point(fn, z0, batch_dims=1, adjoint=adjoint, solver=solver).value.square().sum()

    x, t = problem.x.detach(), problem.v

    def take(adjoint: ti.Adjoint) -> Tensor:
        if transform == "jvp":
            return torch.func.jvp(lambda x: value(x, adjoint), (x,), (t,))[1]
        inner = torch.func.grad(lambda x: value(x, adjoint))
        return torch.func.grad(lambda x: (inner(x) * t).sum())(x)

    torch.testing.assert_close(take(ti.Unroll()), take(ti.Implicit()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: ti.NeumannSeries(terms=-1), "terms"),
        (lambda: ti.PhantomGradient(steps=0), "steps"),
        (lambda: ti.PhantomGradient(damping=0.0), "damping"),
        (lambda: ti.Shine(refine=-1), "refine"),
        (lambda: ti.Unroll(steps=0), "steps"),
        (lambda: ti.Implicit(warm_start=True), "warm_start"),  # pyright: ignore[reportArgumentType]
        (lambda: ti.Implicit(reuse=1), "reuse"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_options_are_checked(make: "type[ti.Adjoint]", match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
