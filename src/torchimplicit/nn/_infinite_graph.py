"""`InfiniteGraph`: a linear graph convolution of infinite depth, `Z = γ S Z g(F) + X`, in closed form."""

from __future__ import annotations

from typing import NamedTuple, Never

import torch
from torch import Tensor, nn

from .._options import refuse_unknown
from ._graph import GraphCertificate, check_graph

_OPTIONS = ("gamma", "device", "dtype")


class Spectrum(NamedTuple):
    """`S = V diag(λ) Vᵀ`: eigenvalues `(n,)` and orthonormal eigenvectors `(n, n)`."""

    values: Tensor
    vectors: Tensor


class InfiniteGraph(nn.Module):
    """The layer `Z = γ S Z g(F) + X`, `g(F) = FᵀF / (‖FᵀF‖_F + ε)` (EIGNN; Liu et al. 2021, equations 3 to 6).

    With S symmetric and `‖S‖₂ ≤ 1`, as the normalised adjacency of an undirected graph is, it is a contraction by
    γ. In the basis of S's eigenvectors the nodes part: `y_i (I − γ λ_i g(F)) = (Vᵀ X)_i`, a d × d system for each, with
    no iteration. (The paper diagonalises `g(F)` too, whose derivative fails where eigenvalues coincide; these systems
    have derivatives of every order and mode.)

    >>> import torch, torchimplicit as ti
    >>> chain = torch.diag(torch.ones(9), 1) + torch.diag(torch.ones(9), -1)
    >>> S = ti.nn.normalize_adjacency(chain)
    >>> layer = ti.nn.InfiniteGraph(16)
    >>> x = torch.randn(4, 10, 16)
    >>> z = layer(x, S)
    >>> torch.allclose(z, layer.gamma * S @ z @ layer.g() + x, atol=1e-5)
    True

    X is `(..., n, d)` and S `(n, n)`, shared by the leading dims. Where one graph is used again and again
    `layer.spectrum(S)` may be computed once and given in its place.

    Args:
        features: d.
        gamma: γ, in (0, 1).
        device: of F.
        dtype: of F.

    Raises:
        TypeError: unknown option.
        ValueError: shapes do not fit; S is not symmetric, has an eigenvalue outside [−1, 1] or asks for a gradient.
    """

    def __init__(
        self,
        features: int,
        *,
        gamma: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown("InfiniteGraph", unknown, _OPTIONS)
        super().__init__()
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"features={features!r} is not valid; give an integer >= 1.")
        if not 0.0 < gamma < 1.0:
            raise ValueError(f"gamma={gamma!r} is not valid; give a number in (0, 1).")
        self.gamma = gamma
        self.F = nn.Parameter(torch.empty(features, features, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.F)

    def g(self) -> Tensor:
        """`FᵀF / (‖FᵀF‖_F + 1e-12)`, `(d, d)`."""
        square = self.F.mT @ self.F
        return square / (torch.linalg.matrix_norm(square) + 1e-12)

    @staticmethod
    @torch.no_grad()
    def spectrum(S: Tensor) -> Spectrum:
        """The decomposition of a symmetric S."""
        dense = S.to_dense() if S.is_sparse else S
        epsilon = torch.finfo(dense.dtype).eps
        size = dense.abs().amax()
        if bool((dense - dense.mT).abs().amax() > 16 * epsilon * size):
            raise ValueError("InfiniteGraph: S must be symmetric; ImplicitGraph takes any adjacency.")
        values, vectors = torch.linalg.eigh(0.5 * (dense + dense.mT))
        if bool(values.abs().amax() > 1 + 64 * epsilon * len(values)):
            raise ValueError(
                f"InfiniteGraph: S has the eigenvalue {float(values.abs().amax()):.4g}, which must be in [-1, 1]; "
                "use torchimplicit.nn.normalize_adjacency."
            )
        return Spectrum(values, vectors)

    def forward(self, x: Tensor, graph: Tensor | Spectrum) -> Tensor:
        """Z for X, `(..., n, d)`, and S, `(n, n)`, or its spectrum."""
        if isinstance(graph, Tensor):
            if graph.requires_grad:
                raise ValueError(
                    "InfiniteGraph: there is no gradient with respect to S; detach it, or use ImplicitGraph."
                )
            check_graph("InfiniteGraph", x, graph, self.F.shape[0])
            graph = self.spectrum(graph)
        values, vectors = graph
        check_graph("InfiniteGraph", x, vectors, self.F.shape[0])
        identity = torch.eye(self.F.shape[0], dtype=self.F.dtype, device=self.F.device)
        matrix = identity - self.gamma * values[:, None, None] * self.g()
        # The leading dims are so many right-hand sides: (n, d, B).
        right = (vectors.mT @ x).flatten(0, -3) if x.ndim > 2 else (vectors.mT @ x)[None]
        found = torch.linalg.solve(matrix, right.permute(1, 2, 0)).permute(2, 0, 1)
        return (vectors @ found).reshape(x.shape)

    @torch.no_grad()
    def certificate(self) -> GraphCertificate:
        """The contraction factor for any S with `‖S‖₂ ≤ 1`, in the 2-norm."""
        factor = self.gamma * float(torch.linalg.matrix_norm(self.g(), 2))
        return GraphCertificate(
            contraction=factor,
            lipschitz=1.0 / (1.0 - factor),
            weight=torch.ones(1),
            source="Liu et al. 2021, theorem 1: γ‖g(F)‖₂‖S‖₂ ≤ γ, in the 2-norm",
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"features={self.F.shape[0]}, gamma={self.gamma}"


def normalize_adjacency(adjacency: Tensor, self_loops: bool = True) -> Tensor:
    """`D^(-1/2) (A + I) D^(-1/2)` of an undirected graph with weights ≥ 0, `(n, n)` (Kipf & Welling 2017).

    Its eigenvalues are in [−1, 1]. Dense in, dense out; a sparse matrix gives a sparse one.

    Args:
        adjacency: `(n, n)`.
        self_loops: add the identity.
    """
    nodes = adjacency.shape[0]
    if adjacency.is_sparse:
        index = torch.arange(nodes, device=adjacency.device)
        one = torch.ones(nodes, dtype=adjacency.dtype, device=adjacency.device)
        total = adjacency + self_loops * torch.sparse_coo_tensor(
            torch.stack([index, index]), one, (nodes, nodes), check_invariants=True
        )
        total = total.coalesce()
        degree = torch.zeros_like(one).index_add(0, total.indices()[0], total.values())
        root = torch.where(degree > 0, degree, 1.0).rsqrt()
        values = total.values() * root[total.indices()[0]] * root[total.indices()[1]]
        return torch.sparse_coo_tensor(total.indices(), values, (nodes, nodes), check_invariants=True).coalesce()
    total = adjacency + torch.eye(nodes, dtype=adjacency.dtype, device=adjacency.device) if self_loops else adjacency
    degree = total.sum(dim=1)
    root = torch.where(degree > 0, degree, 1.0).rsqrt()
    return root[:, None] * total * root
