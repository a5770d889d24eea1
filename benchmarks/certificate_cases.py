"""Certificates of layers on graphs and sequences: what their random instances must show."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti

NODES, FEATURES, LENGTH = 5, 3, 6


@dataclass(frozen=True)
class Case:
    """How to make a layer and its inputs, and what to find out about an instance on them.

    Findings are ratios of what is found to what is claimed (`condition`, `lipschitz`), the distance of the solutions
    from two starts (`starts`), and how many samples did not converge (`failures`).
    """

    make: Callable[[], Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    findings: Callable[..., dict[str, float]]


def _weighted_graph(count: int) -> tuple[Tensor, ...]:
    """Features and a directed graph with weights of both signs, some of them large."""
    present = torch.rand(NODES, NODES) < 0.5
    return torch.randn(count, NODES, FEATURES), 10.0 ** (2 * torch.rand(())) * torch.randn(NODES, NODES) * present


def _undirected_graph(count: int) -> tuple[Tensor, ...]:
    """Features and the normalised adjacency of an undirected graph with random weights."""
    half = torch.rand(NODES, NODES).triu(1) * (torch.rand(NODES, NODES) < 0.7)
    return torch.randn(count, NODES, FEATURES), ti.nn.normalize_adjacency(half + half.mT)


def _sequences(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, LENGTH, 4),)


@torch.no_grad()
def _implicit_graph(layer: ti.nn.ImplicitGraph, x: Tensor, adjacency: Tensor) -> dict[str, float]:
    """The norms are those of the whole linear map `Z ↦ Â Z Wᵀ`, in the certificate's weights, and of the solution."""
    certificate = layer.certificate(adjacency)
    bound, _ = ti.nn._graph.perron(adjacency)
    through = torch.kron(adjacency / torch.where(bound > 0, bound, 1.0), layer.cell.linear.weight)
    weight = certificate.weight.repeat_interleave(FEATURES)
    through = through * weight / weight[:, None]
    slopes = (torch.rand(8, len(weight)) < 0.6).to(x.dtype)
    solution = torch.linalg.solve(torch.eye(len(weight)) - slopes[:, :, None] * through, torch.diag_embed(slopes))
    found = torch.linalg.matrix_norm(through, float("inf"))
    claimed = max(certificate.contraction, 1e-30)
    return {
        "condition": float(found) / claimed * max(1.0, certificate.contraction / 0.95),
        "lipschitz": float(torch.linalg.matrix_norm(solution, float("inf")).max()) / certificate.lipschitz,
    } | _two_starts(layer, x, adjacency)


@torch.no_grad()
def _infinite_graph(layer: ti.nn.InfiniteGraph, x: Tensor, graph: Tensor) -> dict[str, float]:
    """The closed form beside the solution found by iteration from two starts."""
    certificate = layer.certificate()
    through = layer.gamma * torch.kron(graph, layer.g())
    solution = torch.linalg.inv(torch.eye(len(through)) - through)
    starts = [torch.zeros_like(x), 3.0 * torch.randn_like(x)]
    options: dict[str, Any] = {"solver": ti.Anderson(rtol=1e-10), "batch_dims": 1, "on_failure": "ignore"}
    iterated = [ti.fixed_point(lambda z: layer.gamma * graph @ z @ layer.g() + x, z0, **options) for z0 in starts]
    z = layer(x, graph)
    return {
        "condition": float(torch.linalg.matrix_norm(through, 2))
        / certificate.contraction
        * max(1.0, certificate.contraction / layer.gamma),
        "lipschitz": float(torch.linalg.matrix_norm(solution, 2)) / certificate.lipschitz,
        "starts": max(float((s.value - z).abs().max()) for s in iterated) / max(1.0, float(z.abs().max())),
        "failures": float(sum((~s.converged).sum() for s in iterated)),
    }


@torch.no_grad()
def _transformer(layer: ti.nn.EquilibriumTransformer, x: Tensor) -> dict[str, float]:
    """Whatever the state, the map's value is in the ball; as many plain steps as positions end where the solve does."""
    certificate = layer.certificate()
    assert certificate.steps is not None
    states = [scale * torch.randn_like(x) for scale in (0.1, 10.0)]
    z = layer.solve(x)
    far = []
    for state in states:
        for _ in range(certificate.steps * LENGTH):
            state = layer.cell(state, x)
        far.append(float((state - z.value).abs().max()))
    longest = max(float(layer.cell(s, x).norm(dim=-1).max()) for s in (*states, z.value))
    return {
        "condition": longest / certificate.radius,
        "starts": max(far),
        "failures": float((~z.converged).sum()),
    }


def _two_starts(layer: Any, *inputs: Tensor) -> dict[str, float]:
    layer.init = None
    one = layer.solve(*inputs)
    layer.init = lambda x, *_: 3.0 * torch.randn_like(x)
    other = layer.solve(*inputs)
    layer.init = None
    far = float((one.value - other.value).abs().max()) / max(1.0, float(one.value.abs().max()))
    return {"starts": far, "failures": float((~one.converged).sum() + (~other.converged).sum())}


STRUCTURED = {
    "ImplicitGraph": Case(lambda: ti.nn.ImplicitGraph(FEATURES), _weighted_graph, _implicit_graph),
    "InfiniteGraph": Case(lambda: ti.nn.InfiniteGraph(FEATURES), _undirected_graph, _infinite_graph),
    "EquilibriumTransformer": Case(lambda: ti.nn.EquilibriumTransformer(4, heads=2, span=3), _sequences, _transformer),
}
