"""Every solver on complex and scalar states, and down to what float32 can reach."""

import pytest
import torch

import torchimplicit as ti

DOUBLE, COMPLEX = torch.float64, torch.complex128
SOLVERS = {
    "picard": ti.Picard(),
    "anderson": ti.Anderson(),
    "broyden": ti.Broyden(update="good"),
    "broyden_bad": ti.Broyden(update="bad"),
    "newton": ti.Newton(),
    "newton_krylov": ti.NewtonKrylov(),
    "chord": ti.Chord(),
    "dogleg": ti.Dogleg(),
    "levenberg_marquardt": ti.LevenbergMarquardt(),
    "levenberg_marquardt_cg": ti.LevenbergMarquardt(linear_solver="cg"),
    "auto": ti.Auto(),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@EVERY_SOLVER
def test_complex_fixed_point_that_is_not_holomorphic(solver: ti.solvers.Method) -> None:
    c = torch.tensor([[1 + 2j, 0.5j], [-1.0 + 0j, 2 - 1j]], dtype=COMPLEX)
    sol = ti.fixed_point(lambda z: 0.3 * z.conj() + 0.2j * z + c, torch.zeros_like(c), solver=solver, batch_dims=1)
    # With (a, b) = (Re z, Im z): a = .3a − .2b + Re c, b = −.3b + .2a + Im c.
    matrix = torch.tensor([[0.7, 0.2], [-0.2, 1.3]], dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, torch.view_as_real(c)[..., None])[..., 0]
    assert sol.converged.all()
    torch.testing.assert_close(torch.view_as_real(sol.value), expected, rtol=1e-9, atol=1e-9)


@EVERY_SOLVER
def test_scalar_state(solver: ti.solvers.Method) -> None:
    sol = ti.fixed_point(torch.cos, torch.zeros((), dtype=DOUBLE), solver=solver)
    assert sol.value.shape == sol.converged.shape == ()
    assert sol.value.item() == pytest.approx(0.7390851332151607, abs=1e-9)


def _float32_maps() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Linear maps `z W + x`: symmetric ones up to the contraction .95, and non-normal ones."""
    generator = torch.Generator().manual_seed(0)
    n, maps = 50, {}
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    x = torch.randn(8, n, generator=generator)
    for gamma in (0.5, 0.8, 0.9, 0.95):
        maps[f"symmetric {gamma}"] = (basis @ torch.diag(torch.linspace(-gamma, gamma, n)) @ basis.T, x)
    for gamma in (0.5, 0.8):
        upper = torch.triu(torch.randn(n, n, generator=generator), 1) * 0.3 / n**0.5
        maps[f"non-normal {gamma}"] = (upper + torch.diag(torch.linspace(-gamma, gamma, n)), x)
    return maps


@pytest.mark.parametrize("name", _float32_maps())
@pytest.mark.parametrize("solver", ["anderson", "broyden", "broyden_bad"])
def test_float32_goes_down_to_ten_rounding_units(solver: str, name: str) -> None:
    """An absolute regularisation stalls thousands of units above."""
    matrix, x = _float32_maps()[name]
    tight = 10 * torch.finfo(torch.float32).eps
    settings = {**vars(SOLVERS[solver]), "rtol": tight, "atol": 0.0, "history": 10}
    sol = ti.fixed_point(
        lambda z: z @ matrix + x, torch.zeros_like(x), solver=type(SOLVERS[solver])(**settings), batch_dims=1
    )
    assert sol.converged.all()
    value = sol.value @ matrix + x
    residual = (value - sol.value).square().mean(dim=1).sqrt()
    assert (residual <= 1.2 * tight * value.square().mean(dim=1).sqrt()).all()
