"""Refinement: products in reduced precision first, in full after that; the results are those of full precision."""

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit._refinement import ROUGH, reduced
from torchimplicit.linear import ResidualJacobian
from torchimplicit.linear._operator import AutogradJacobian

CPU = torch.device("cpu")
REFINED = ti.Implicit(rtol=1e-5, linear_solver=ti.Cascade(neumann=ti.Neumann(slowest=0.97, mixed_precision=True)))


def _switches() -> tuple[str, str]:
    mkldnn = torch.backends.mkldnn
    return mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]


def _equation(n: int = 64, batch: int = 8, radius: float = 0.8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, n, generator=generator) * radius / n**0.5
    return weight.requires_grad_(), torch.randn(batch, n, generator=generator).requires_grad_()


class Watched:
    """`tanh(z Wᵀ + x)`, which notes the precision in which it is evaluated, and rounds as bfloat16 would."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen: list[str] = []

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        mode = _switches()[0]
        self.seen.append(mode)
        weight = self.weight.bfloat16().float() if mode == "bf16" else self.weight  # whatever the machine has
        return torch.tanh(z @ weight.T + x)


def test_reduced_precision_ends_with_its_block_even_by_an_error() -> None:
    before = _switches()
    with reduced(CPU):
        assert _switches() == ("bf16", "bf16")
    assert _switches() == before
    with pytest.raises(ZeroDivisionError), reduced(CPU):
        raise ZeroDivisionError
    assert _switches() == before


@pytest.mark.parametrize(
    "solver",
    [
        ti.Picard(rtol=1e-6, mixed_precision=True),
        ti.Picard(rtol=1e-6, check_every=4, extrapolate_every=8, mixed_precision=True),
        ti.Anderson(rtol=1e-6, mixed_precision=True),
        ti.Broyden(rtol=1e-6, mixed_precision=True),
        ti.Auto(rtol=1e-6, mixed_precision=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_solution_is_that_of_full_precision(solver: ti.solvers.Method) -> None:
    weight, x = _equation()
    fn = Watched(weight)
    z0 = torch.zeros_like(x)
    solution = ti.fixed_point(fn, z0, x, solver=solver, adjoint=REFINED, batch_dims=1)
    assert solution.converged.all()
    assert "bf16" in fn.seen
    assert fn.seen[-1] != "bf16"  # the one that counts
    exact = solution.value.detach().double()
    for _ in range(300):
        exact = torch.tanh(exact @ weight.detach().double().T + x.detach().double())
    residual = torch.tanh(solution.value.double() @ weight.double().T + x.double()) - solution.value.double()
    size = solution.value.double().square().mean(1).sqrt()
    assert (residual.square().mean(1).sqrt() <= 1.1e-6 * size).all()
    torch.testing.assert_close(solution.value.double(), exact, rtol=0, atol=2e-5)
    plain = fn.seen.index("bf16")
    assert int(solution.steps.max()) >= fn.seen.count("bf16") >= plain


def test_gradient_is_that_of_full_precision() -> None:
    weight, x = _equation()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    fn = Watched(weight)
    solution = ti.fixed_point(fn, torch.zeros_like(x), x, solver=ti.Picard(rtol=1e-7), adjoint=REFINED, batch_dims=1)
    solution.value.backward(v)
    w, y = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    z = torch.zeros_like(y)
    for _ in range(300):
        z = torch.tanh(z @ w.T + y)
    z.backward(v.double())
    assert weight.grad is not None and x.grad is not None and w.grad is not None and y.grad is not None
    assert (weight.grad.double() - w.grad).norm() <= 2e-5 * w.grad.norm()
    assert (x.grad.double() - y.grad).norm() <= 2e-5 * y.grad.norm()
    assert solution.adjoint.residual is not None
    assert (solution.adjoint.residual <= 1e-5).all()


def test_double_precision_is_left_alone() -> None:
    weight, x = _equation()
    fn = Watched(weight.detach().double())
    ti.fixed_point(
        fn, torch.zeros_like(x).double(), x.detach().double(), solver=ti.Picard(mixed_precision=True), batch_dims=1
    )
    assert "bf16" not in fn.seen


def test_a_tolerance_that_reduced_precision_meets_is_judged_in_full() -> None:
    weight, x = _equation()
    fn = Watched(weight.detach())
    solver = ti.Picard(rtol=2 * ROUGH, mixed_precision=True)
    solution = ti.fixed_point(fn, torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1)
    assert fn.seen[-1] != "bf16"
    residual = torch.tanh(solution.value @ weight.T + x) - solution.value
    told = solution.residual
    torch.testing.assert_close(residual.detach().square().mean(1).sqrt(), told, rtol=1e-4, atol=0)


def test_a_sample_that_fails_does_not_touch_the_others() -> None:
    weight, x = _equation()
    poisoned = x.detach().clone()
    poisoned[2] = torch.nan
    solver = ti.Picard(rtol=1e-6, mixed_precision=True)
    healthy = ti.fixed_point(Watched(weight), torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1)
    other = ti.fixed_point(
        Watched(weight), torch.zeros_like(x), poisoned, solver=solver, batch_dims=1, on_failure="ignore"
    )
    keep = torch.arange(len(x)) != 2
    assert not other.converged[2]
    assert other.converged[keep].all()
    torch.testing.assert_close(other.value[keep], healthy.value[keep], rtol=0, atol=1e-6)


def test_refinement_that_does_not_converge_is_finished_in_full() -> None:
    """A product whose reduced form is wrong altogether: the sum in full takes over, and nothing false is reported."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 20, 20, generator=generator) * 0.6 / 20**0.5

    class Wrong:
        divisible = True

        def __init__(self, matrix: Tensor) -> None:
            self.matrix = matrix

        def mv(self, p: Tensor) -> Tensor:
            sign = -1.0 if _switches()[0] == "bf16" else 1.0
            return p - sign * torch.bmm(self.matrix, p[:, :, None])[:, :, 0]

        def neumann(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
            total, rest = p, p - self.mv(p)
            for _ in range(terms - 1):
                total, rest = total + rest, rest - self.mv(rest)
            return total, rest

        def dense(self) -> Tensor:
            return torch.eye(20) - self.matrix

        def select(self, samples: Tensor) -> "Wrong":
            return Wrong(self.matrix.index_select(0, samples))

    b = torch.randn(4, 20, generator=generator)
    found = ti.Neumann(mixed_precision=True).solve(Wrong(matrix), b, 1e-5)
    assert found.solved
    torch.testing.assert_close(found.value, torch.linalg.solve(torch.eye(20) - matrix, b), rtol=1e-4, atol=1e-4)


def test_mixed_precision_must_be_a_truth_value() -> None:
    with pytest.raises(ValueError, match="mixed_precision"):
        ti.Picard(mixed_precision="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mixed_precision"):
        ti.Neumann(mixed_precision=1)  # pyright: ignore[reportArgumentType]


def test_neumann_refines_to_the_tolerance_asked_for() -> None:
    weight, x = _equation()
    z = x.detach()
    jacobian = AutogradJacobian.at(lambda z: Watched(weight.detach())(z, x.detach()), z, lambda _: None)
    operator = ResidualJacobian(jacobian, shifted=True)
    b = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = ti.Neumann(mixed_precision=True).solve(operator, b, 3e-6)
    exact = torch.linalg.solve(operator.dense().double(), b.double())
    assert found.solved
    assert ((b - operator.mv(found.value)).norm(dim=1) <= 3.1e-6 * b.norm(dim=1)).all()
    torch.testing.assert_close(found.value.double(), exact, rtol=0, atol=1e-4)
