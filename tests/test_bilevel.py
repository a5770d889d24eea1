"""Bilevel examples: hyper-gradients of a solution, first and second, against closed forms and `torch.linalg`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import torchimplicit as ti
from tests.modes import normal
from tests.problems import EXACT, TIGHT

DATA, TARGETS = normal(12, 3, seed=1), normal(12, seed=2)
HELD_OUT, WANTED = normal(6, 3, seed=3), normal(6, seed=4)
ZERO = torch.zeros(3, dtype=torch.float64)


def near(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-10)


# --- ridge regression: the penalty, by `minimize` --------------------------------------------------------------------


def ridge(penalty: Tensor) -> Tensor:
    def objective(z: Tensor) -> Tensor:
        return 0.5 * ((DATA @ z - TARGETS) ** 2).sum() + 0.5 * penalty * (z**2).sum()

    return ti.minimize(objective, ZERO, solver=ti.Newton(rtol=TIGHT), adjoint=EXACT).value


def ridge_by_algebra(penalty: Tensor) -> Tensor:
    return torch.linalg.solve(DATA.T @ DATA + penalty * torch.eye(3, dtype=torch.float64), DATA.T @ TARGETS)


def test_ridge_regression_in_its_penalty() -> None:
    """`z = M⁻¹ Xᵀy` with `M = XᵀX + λ`: `z' = −M⁻¹z` and `z'' = 2 M⁻² z`."""
    penalty = torch.tensor(0.7, dtype=torch.float64)
    inverse = torch.linalg.inv(DATA.T @ DATA + penalty * torch.eye(3, dtype=torch.float64))
    z = inverse @ DATA.T @ TARGETS
    near(ridge(penalty), z)
    near(jacrev(ridge)(penalty), -inverse @ z)
    near(jacfwd(ridge)(penalty), -inverse @ z)
    for twice in (jacfwd(jacrev(ridge)), jacrev(jacfwd(ridge)), jacrev(jacrev(ridge))):
        near(twice(penalty), 2 * inverse @ inverse @ z)
    leaf = penalty.clone().requires_grad_()
    (first,) = torch.autograd.grad(ridge(leaf)[0], leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf)
    near(first.detach(), -(inverse @ z)[0])
    near(second, 2 * (inverse @ inverse @ z)[0])


def validation(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda log_penalty: ((HELD_OUT @ solve(log_penalty.exp()) - WANTED) ** 2).mean()


def test_newton_steps_on_the_validation_loss_find_the_best_penalty() -> None:
    """The outer problem in `log λ`, with its exact first and second derivatives, which are those of the closed form."""
    t = torch.tensor(0.5, dtype=torch.float64)
    outer, truth = validation(ridge), validation(ridge_by_algebra)
    for _ in range(8):
        slope, curvature = grad(outer)(t), hessian(outer)(t)
        near(slope, grad(truth)(t))
        near(curvature, hessian(truth)(t))
        t = t - slope / curvature.abs().clamp(min=0.05)
    many = torch.linspace(-1, 2, 5, dtype=torch.float64)
    near(vmap(grad(outer))(many), vmap(grad(truth))(many))


# --- weighted least squares: the weights of the data, by `least_squares` ---------------------------------------------


def test_least_squares_in_the_weights_of_its_data() -> None:
    """The influence of each datum: `dz/dwᵢ = M⁻¹ xᵢ (yᵢ − xᵢz)` with `M = XᵀWX`."""

    def fitted(weights: Tensor) -> Tensor:
        rows = lambda z: weights.sqrt() * (DATA @ z - TARGETS)  # noqa: E731
        return ti.least_squares(rows, ZERO, solver=ti.LevenbergMarquardt(rtol=TIGHT), adjoint=EXACT).value

    def by_algebra(weights: Tensor) -> Tensor:
        return torch.linalg.solve(DATA.T @ (weights[:, None] * DATA), DATA.T @ (weights * TARGETS))

    weights = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    z = by_algebra(weights)
    inverse = torch.linalg.inv(DATA.T @ (weights[:, None] * DATA))
    influence = inverse @ (DATA * (TARGETS - DATA @ z)[:, None]).T
    near(jacrev(fitted)(weights), influence)
    near(jacfwd(fitted)(weights), influence)
    near(hessian(lambda w: fitted(w).sum())(weights), hessian(lambda w: by_algebra(w).sum())(weights))


# --- equilibria: softmax and Sinkhorn, by `fixed_point` --------------------------------------------------------------


def test_a_softmax_equilibrium_in_its_payoffs() -> None:
    """Logit play `z = softmax(b + C z)`: `dz/db = (I − S C)⁻¹ S` with `S = diag(z) − zzᵀ`."""
    C, b = 0.8 * normal(4, 4, seed=5), normal(4, seed=6)

    def play(b: Tensor, C: Tensor) -> Tensor:
        start = torch.full((4,), 0.25, dtype=torch.float64)
        fn = lambda z: torch.softmax(b + C @ z, dim=0)  # noqa: E731
        return ti.fixed_point(fn, start, solver=ti.Anderson(rtol=TIGHT), adjoint=EXACT).value

    def slopes(b: Tensor, C: Tensor) -> Tensor:
        z = play(b, C)
        S = torch.diag(z) - z[:, None] * z
        return torch.linalg.solve(torch.eye(4, dtype=torch.float64) - S @ C, S)

    z, by_b = play(b, C), slopes(b, C)
    near(jacrev(play)(b, C), by_b)
    near(jacfwd(play)(b, C), by_b)
    near(jacrev(play, argnums=1)(b, C), by_b[:, :, None] * z)
    # The derivative of the formula, in which z is differentiated once only, is the second derivative.
    near(jacfwd(jacrev(play))(b, C), jacrev(slopes)(b, C))
    near(jacrev(jacfwd(play))(b, C), jacrev(slopes)(b, C))


COST = normal(3, 4, seed=7) ** 2
SOURCE, SINK = torch.softmax(normal(3, seed=8), 0), torch.softmax(normal(4, seed=9), 0)
BLUR = 0.4


def plan(cost: Tensor) -> Tensor:
    """The entropic transport plan, by Sinkhorn's iteration for the potential f; its mean is a free constant."""

    def other(f: Tensor) -> Tensor:
        return -BLUR * torch.logsumexp((f[:, None] - cost) / BLUR + SOURCE.log()[:, None], dim=0)

    def sinkhorn(f: Tensor) -> Tensor:
        new = -BLUR * torch.logsumexp((other(f) - cost) / BLUR + SINK.log(), dim=1)
        return new - new.mean()

    f = ti.fixed_point(sinkhorn, ZERO, solver=ti.Anderson(rtol=TIGHT), adjoint=EXACT).value
    # The constant cancels here, as g is found from f.
    return SOURCE[:, None] * SINK * torch.exp((f[:, None] + other(f) - cost) / BLUR)


def transport(cost: Tensor) -> Tensor:
    """`⟨P, C⟩ + ε KL(P | a⊗b)`, whose gradient is P (the envelope theorem)."""
    P = plan(cost)
    return (P * cost).sum() + BLUR * (P * (P / (SOURCE[:, None] * SINK)).log()).sum()


def plan_along(cost: Tensor, direction: Tensor) -> Tensor:
    """`dP = P ∘ (df ⊕ dg − dC)/ε` with zero marginals: a linear system for df and dg."""
    P = plan(cost)
    top = torch.cat([torch.diag(P.sum(1)), P], dim=1)
    bottom = torch.cat([P.T, torch.diag(P.sum(0))], dim=1)
    right = torch.cat([(P * direction).sum(1), (P * direction).sum(0)])
    solution = torch.linalg.lstsq(torch.cat([top, bottom]), right[:, None], driver="gelsd").solution[:, 0]
    return P * (solution[:3, None] + solution[3:] - direction) / BLUR


def test_entropic_transport_in_its_costs() -> None:
    P, direction = plan(COST), normal(3, 4, seed=10)
    near(P.sum(0), SINK)
    near(P.sum(1), SOURCE)
    near(grad(transport)(COST), P)
    along = plan_along(COST, direction)
    near(jvp(plan, (COST,), (direction,))[1], along)
    near(jvp(grad(transport), (COST,), (direction,))[1], along)
    near(grad(lambda cost: (grad(transport)(cost) * direction).sum())(COST), along)  # P is symmetric in this sense
    leaf = COST.clone().requires_grad_()
    (first,) = torch.autograd.grad(transport(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    near(first.detach(), P)
    near(second, along)


# --- a market that clears, by `root` ---------------------------------------------------------------------------------


def demand(p: Tensor, taste: Tensor, elasticity: Tensor) -> Tensor:
    return taste * p**-elasticity


def supply(p: Tensor, cost: Tensor) -> Tensor:
    return cost * p


def price(taste: Tensor, elasticity: Tensor, cost: Tensor) -> Tensor:
    excess = lambda p: demand(p, taste, elasticity) - supply(p, cost)  # noqa: E731
    return ti.root(excess, torch.ones_like(taste), batch_dims=taste.ndim, solver=ti.Newton(rtol=TIGHT)).value


def price_by_algebra(taste: Tensor, elasticity: Tensor, cost: Tensor) -> Tensor:
    return (taste / cost) ** (1 / (1 + elasticity))


TASTE, ELASTICITY, COSTS = (torch.tensor(v, dtype=torch.float64) for v in (3.0, 0.6, 1.4))


def test_the_clearing_price_moves_as_supply_and_demand_say() -> None:
    """`dp/da = −Dₐ / (D' − S')`, and so for the other parameters."""
    p = price_by_algebra(TASTE, ELASTICITY, COSTS)
    slope = -ELASTICITY * TASTE * p ** (-ELASTICITY - 1) - COSTS
    by_taste, by_elasticity, by_cost = jacrev(price, argnums=(0, 1, 2))(TASTE, ELASTICITY, COSTS)
    near(by_taste, -(p**-ELASTICITY) / slope)
    near(by_elasticity, TASTE * p**-ELASTICITY * p.log() / slope)
    near(by_cost, p / slope)
    for found, truth in zip(
        hessian(price, argnums=(0, 1, 2))(TASTE, ELASTICITY, COSTS),
        hessian(price_by_algebra, argnums=(0, 1, 2))(TASTE, ELASTICITY, COSTS),
        strict=True,
    ):
        near(torch.stack(found), torch.stack(truth))


def test_total_derivative_of_revenue_has_the_direct_and_the_price_part() -> None:
    """Tax revenue `t · D(p(t))` with the tax in the price that demand sees."""

    def revenue(tax: Tensor) -> Tensor:
        excess = lambda p: demand(p + tax, TASTE, ELASTICITY) - supply(p, COSTS)  # noqa: E731
        p = ti.root(excess, torch.ones_like(tax), solver=ti.Newton(rtol=TIGHT), adjoint=EXACT).value
        return tax * demand(p + tax, TASTE, ELASTICITY)

    tax = torch.tensor(0.3, dtype=torch.float64)
    excess = lambda p: demand(p + tax, TASTE, ELASTICITY) - supply(p, COSTS)  # noqa: E731
    p = ti.root(excess, torch.ones_like(tax), solver=ti.Newton(rtol=TIGHT)).value
    D, slope = demand(p + tax, TASTE, ELASTICITY), -ELASTICITY * TASTE * (p + tax) ** (-ELASTICITY - 1)
    moved = -slope / (slope - COSTS)
    near(grad(revenue)(tax), D + tax * slope * (1 + moved))
    step = 1e-5
    difference = (grad(revenue)(tax + step) - grad(revenue)(tax - step)) / (2 * step)
    torch.testing.assert_close(hessian(revenue)(tax), difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batched", ["by batch_dims", "by vmap"])
def test_many_markets_at_once(batched: str) -> None:
    tastes = torch.linspace(1, 5, 7, dtype=torch.float64)
    others = ELASTICITY.expand(7), COSTS.expand(7)
    if batched == "by vmap":
        found = vmap(grad(price))(tastes, *others)
    else:
        found = grad(lambda tastes: price(tastes, *others).sum())(tastes)
    near(found, vmap(grad(price_by_algebra))(tastes, *others))


# --- a learned initial condition: an inner problem per task, a shared outer parameter --------------------------------


def test_meta_learning_of_a_shared_centre() -> None:
    """iMAML's inner problem `min ½|Xz − y|² + ½λ|z − θ|²` per task: `dz/dθ = λ (XᵀX + λ)⁻¹`."""
    tasks, targets, centre, strength = normal(4, 5, 3, seed=11), normal(4, 5, seed=12), normal(3, seed=13), 2.0

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = torch.nn.Parameter(centre.clone())

        def forward(self, z: Tensor) -> Tensor:
            fit = ((torch.einsum("tij,tj->ti", tasks, z) - targets) ** 2).sum(1)
            return 0.5 * fit + 0.5 * strength * ((z - self.centre) ** 2).sum(1)

    inner, zero = Inner(), torch.zeros(4, 3, dtype=torch.float64)

    def adapted(theta: Tensor) -> Tensor:
        fn = lambda z: functional_call(inner, {"centre": theta}, (z,))  # noqa: E731
        return ti.minimize(fn, zero, batch_dims=1, solver=ti.Newton(rtol=TIGHT), adjoint=EXACT).value

    expected = strength * torch.linalg.inv(tasks.mT @ tasks + strength * torch.eye(3, dtype=torch.float64))
    near(jacrev(adapted)(centre), expected)
    near(jacfwd(adapted)(centre), expected)
    sol = ti.minimize(inner, zero, batch_dims=1, solver=ti.Newton(rtol=TIGHT), adjoint=EXACT)
    (sol.value**2).sum().backward()
    assert inner.centre.grad is not None
    near(inner.centre.grad, 2 * torch.einsum("ti,tij->j", sol.value.detach(), expected))
