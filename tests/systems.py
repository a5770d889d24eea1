"""Linear systems to test solvers on: matrices with known properties, as operators that count their products."""

import torch
from torch import Tensor

from torchimplicit.linear import (
    CG,
    GMRES,
    LU,
    QR,
    BiCGStab,
    Cascade,
    LinearSolution,
    LinearSolver,
    Neumann,
)

RTOL = 1e-10
N = 12
SOLVERS: dict[str, LinearSolver] = {
    "LU": LU(),
    "QR": QR(),
    "GMRES": GMRES(),
    "BiCGStab": BiCGStab(),
    "CG": CG(),
    "Neumann": Neumann(),
    "Cascade": Cascade(),
    "Cascade-iterative": Cascade(small=0),
    "Cascade-matrix-free": Cascade(small=0, dense_limit=0),
}
ITERATIVE = [name for name in SOLVERS if name not in ("LU", "QR", "Cascade")]
GENERAL = [name for name in SOLVERS if name not in ("Neumann", "CG")]


class Dense:
    """A batch of matrices as a linear operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.products = 0

    def mv(self, p: Tensor) -> Tensor:
        self.products += 1
        return torch.einsum("bij,bj->bi", self.matrix, p)

    def neumann(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        total, rest = p, p - self.mv(p)
        for _ in range(terms - 1):
            total, rest = total + rest, rest - self.mv(rest)
        return total, rest

    def dense(self) -> Tensor:
        return self.matrix

    def select(self, samples: Tensor) -> "Dense":
        return Dense(self.matrix[samples])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(batch, n, n, seed=seed))[0]


def spectrum(*values: float, batch: int = 5) -> Tensor:
    """Symmetric matrices with these eigenvalues."""
    q = orthogonal(batch, len(values), seed=3)
    return q * torch.tensor(values, dtype=torch.float64) @ q.mT


def contraction(radius: float, batch: int = 5, n: int = N) -> Tensor:
    """`I − J` with `‖J‖ = radius`."""
    return torch.eye(n, dtype=torch.float64) - radius * orthogonal(batch, n, seed=4)


def definite(radius: float, batch: int = 5, n: int = N) -> Tensor:
    """Symmetric, with eigenvalues from `1 − radius` to `1 + radius`."""
    return spectrum(*torch.linspace(1 - radius, 1 + radius, n, dtype=torch.float64).tolist(), batch=batch)


def suited(name: str, radius: float, batch: int = 5, n: int = N) -> Tensor:
    """A matrix that the solver of this name can solve with."""
    return (definite if name == "CG" else contraction)(radius, batch, n)


def upper(diagonal: float, above: float, n: int = N) -> Tensor:
    """A non-normal matrix: its Krylov spaces say little until they are full."""
    eye, ones = torch.eye(n, dtype=torch.float64), torch.ones(n - 1, dtype=torch.float64)
    return (diagonal * eye + above * torch.diag(ones, 1)).expand(5, n, n)


def skew(batch: int = 5, n: int = N) -> Tensor:
    a = normal(batch, n, n, seed=5)
    return a - a.mT


def true_residual(matrix: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """`‖b − A x‖ / ‖b‖`, 0 where b = 0."""
    size = b.norm(dim=1)
    return torch.where(size > 0, (b - torch.einsum("bij,bj->bi", matrix, x)).norm(dim=1) / size, 0.0)


def solve(name: str, matrix: Tensor, b: Tensor, rtol: float | Tensor = RTOL) -> LinearSolution:
    return SOLVERS[name].solve(Dense(matrix), b, rtol)


EASY = {
    "well-conditioned": torch.eye(N) * 2 + 0.3 * normal(5, N, N, seed=1) / N**0.5,
    "contraction 0.8": contraction(0.8),
    "contraction 0.3": contraction(0.3),
    "non-normal": upper(1.0, 1.0),
    "cyclic shift": torch.roll(torch.eye(N, dtype=torch.float64), 1, 0).expand(5, N, N),
    "skew": skew(),
    "skew-dominant": torch.eye(N) + skew(),
    "orthogonal": orthogonal(5, N, seed=6),
    "indefinite": spectrum(*torch.linspace(-3, 3, N).tolist()),
    "identity": torch.eye(N, dtype=torch.float64).expand(5, N, N),
    "multiples of the identity": torch.eye(N) * torch.tensor([-1.0, 3.0, 0.5, 1e-8, 1e8])[:, None, None],
    "identity plus rank one": torch.eye(N) + normal(5, N, 1, seed=7) @ normal(5, 1, N, seed=8),
    "small units": contraction(0.5) * 1e-8,
    "large units": contraction(0.5) * 1e8,
}
EASY = {name: matrix.double() for name, matrix in EASY.items()}
