"""What the code of a row may name: one small problem, the same for a peer and for us, and the peer's own names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti

Names = dict[str, Any]
FEATURES = 3


def _common(batch: int | None) -> Names:
    """`z = tanh(W z + x)`, a contraction, with W symmetric; the leaves are W and x."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = normal(FEATURES, FEATURES)
    W = 0.25 * (W + W.T) / torch.linalg.matrix_norm(W, 2)
    shape = (FEATURES,) if batch is None else (batch, FEATURES)
    x = normal(*shape)
    return {"torch": torch, "ti": ti, "W": W.requires_grad_(), "x": x.requires_grad_(), "z0": torch.zeros_like(x)}


def torchdeq_names() -> Names:
    import torchdeq
    from torchdeq.loss import fp_correction, jac_reg
    from torchdeq.norm import apply_norm
    from torchdeq.utils.mem import mem_gc

    class Cell(nn.Module):
        def __init__(self, W: Tensor) -> None:
            super().__init__()
            self.W = nn.Parameter(W.detach())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ self.W.T + x)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.float64)

    names = _common(4)
    cell, x = Cell(names["W"]), names["x"]
    W = names["W"] = cell.W

    def f(z: Tensor) -> Tensor:
        return cell(z, x)

    zs = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(100):
            zs = f(zs)
    torch.manual_seed(0)
    return {
        **names,
        "f": f,
        "cell": cell,
        "pair": lambda a, b: (torch.tanh(0.5 * b @ W.T + x), 0.3 * a + 0.1),
        "zs": zs.requires_grad_(),
        "y": x.detach().flip(0),
        "loss": lambda s, y: (s - y).square().mean(),
        "states": [f(names["z0"]), f(f(names["z0"])), f(f(f(names["z0"])))],
        "jacobian": lambda z: (1 - z.square())[:, :, None] * W,
        "normed": Normed(),
        "get_deq": torchdeq.get_deq,
        "deq": torchdeq.get_deq(ift=True, f_tol=1e-9, f_max_iter=200, b_tol=1e-10, b_max_iter=200),
        "reset_deq": torchdeq.reset_deq,
        "mem_gc": mem_gc,
        "jac_reg": jac_reg,
        "fp_correction": fp_correction,
        "apply_norm": apply_norm,
        "seen": [],
        "model": cell,
    }


def _functions() -> Names:
    """The same equation as functions of all that they read, and an energy."""

    def h(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(W @ z + x)

    def energy(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z @ z + 0.5 * torch.cosh(W @ z).sum() - x @ z

    return {"h": h, "g": lambda z, W, x: z - h(z, W, x), "energy": energy}


def xitorch_names() -> Names:
    from xitorch import EditableModule, LinearOperator
    from xitorch.linalg import solve
    from xitorch.optimize import equilibrium, minimize, rootfinder

    names = {**_common(None), **_functions()}
    g = names["g"]

    class Editable(EditableModule):
        def __init__(self, W: Tensor) -> None:
            self.W = W

        def g(self, z: Tensor, x: Tensor) -> Tensor:
            return g(z, self.W, x)

        def getparamnames(self, methodname: str, prefix: str = "") -> list[str]:
            return [prefix + "W"]

    W = names["W"]
    eye = torch.eye(FEATURES, dtype=torch.float64)
    return {
        **names,
        "Editable": Editable,
        "LinearOperator": LinearOperator,
        "solve": solve,
        "rootfinder": rootfinder,
        "equilibrium": equilibrium,
        "minimize": minimize,
        "A": eye + W,
        "spd": eye + W @ W.T,
        "b": names["x"],
    }


def torchopt_names() -> Names:
    from torchopt.diff.implicit import ImplicitMetaGradientModule, custom_root
    from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

    names = {**_common(None), **_functions()}
    h, energy = names["h"], names["energy"]

    def solver(z0: Tensor, W: Tensor, x: Tensor) -> Tensor:
        z = z0
        for _ in range(100):
            z = h(z, W, x)
        return z

    def minimiser(z0: Tensor, W: Tensor, x: Tensor) -> Tensor:
        z, slope = z0, torch.func.grad(energy)
        for _ in range(400):
            z = z - 0.3 * slope(z, W, x)
        return z

    class Inner(ImplicitMetaGradientModule, linear_solve=solve_cg()):
        def __init__(self, z0: Tensor, W: Tensor, x: Tensor) -> None:
            super().__init__()
            self.W = W
            self.x = x
            self.z = nn.Parameter(z0.clone())

        def objective(self) -> Tensor:
            return energy(self.z, self.W, self.x)

        def solve(self) -> Any:
            z = self.z.detach()
            with torch.no_grad():
                self.z.copy_(minimiser(z, self.W.detach(), self.x.detach()))
            return self

    def second(z: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(z.square().sum(), names["W"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), names["W"])[0]

    return {
        **names,
        "optimality": names["g"],
        "solver": solver,
        "with_aux": lambda z0, W, x: (solver(z0, W, x), {"steps": 100}),
        "minimiser": minimiser,
        "Inner": Inner,
        "second": second,
        "custom_root": custom_root,
        "solve_cg": solve_cg,
        "solve_inv": solve_inv,
        "solve_normal_cg": solve_normal_cg,
    }


NAMES: dict[str, Callable[[], Names]] = {
    "torchdeq": torchdeq_names,
    "xitorch": xitorch_names,
    "torchopt": torchopt_names,
}
