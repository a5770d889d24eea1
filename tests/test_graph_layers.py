"""The graph layers: their certificates hold on random graphs, their solutions and gradients are exact."""

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.nn import ImplicitGraph, InfiniteGraph, normalize_adjacency
from torchimplicit.nn._graph import RowBall, perron


def random_graph(nodes: int, density: float = 0.4, symmetric: bool = True) -> Tensor:
    """Weights in [0, 1); some nodes may be alone."""
    weights = torch.rand(nodes, nodes, dtype=torch.float64)
    graph = torch.where(torch.rand(nodes, nodes) < density, weights, 0.0).triu(1)
    return graph + graph.mT if symmetric else graph + torch.tril(graph.mT.roll(1, 0), -1)


def random_layer(features: int, kappa: float, activation: str = "tanh", size: float = 3.0) -> ImplicitGraph:
    layer = ImplicitGraph(features, kappa=kappa, activation=activation, dtype=torch.float64)
    with torch.no_grad():
        layer.cell.linear.parametrizations.weight.original.normal_().mul_(size)  # type: ignore[union-attr, operator]
    return layer


def test_the_row_projection_is_the_nearest_feasible_matrix() -> None:
    project = RowBall(0.9)
    for _ in range(100):
        W = torch.randn(5, 7, dtype=torch.float64) * torch.rand(5, 1, dtype=torch.float64) * 2
        W[0, :3] = 0.5  # ties
        P = project(W)
        assert P.abs().sum(1).max() <= 0.9 + 1e-12
        assert (project(P) - P).abs().max() < 1e-12
        small = W.abs().sum(1) <= 0.9
        assert torch.equal(P[small], W[small])
        Y = torch.randn(50, 5, 7, dtype=torch.float64)
        Y = 0.9 * Y / Y.abs().sum(2, keepdim=True)
        assert ((W - P) * (Y - P)).sum(2).max() <= 1e-12  # the variational inequality of a projection
    W = (2 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(project, W)


def test_perron_bounds_the_spectral_radius_and_is_sharp_on_a_connected_graph() -> None:
    for seed in range(100):
        torch.manual_seed(seed)
        graph = random_graph(12, symmetric=seed % 2 == 0)
        exact = torch.linalg.eigvals(graph).abs().max()
        bound, v = perron(graph)
        assert v.min() > 0
        assert ((graph @ v) <= bound * v * (1 + 1e-12)).all()
        assert bound >= exact * (1 - 1e-9)
    connected = random_graph(12) + torch.ones(12, 12, dtype=torch.float64)
    assert perron(connected)[0] / torch.linalg.eigvals(connected).abs().max() - 1 < 1e-6


def test_the_certificate_holds_on_1000_random_instances() -> None:
    for seed in range(1000):
        torch.manual_seed(seed)
        kappa = float(torch.empty(()).uniform_(0.1, 0.99))
        layer = random_layer(4, kappa, ("relu", "tanh", "identity")[seed % 3])
        graph = random_graph(6, symmetric=seed % 2 == 0)
        certificate = layer.certificate(graph)
        assert certificate.contraction <= kappa + 1e-9
        bound, _ = perron(graph)
        scaled = graph / torch.where(bound > 0, bound, 1.0)
        W = layer.cell.linear.weight
        z, y, x = (torch.randn(6, 4, dtype=torch.float64) for _ in range(3))

        def norm(t: Tensor, v: Tensor = certificate.weight) -> Tensor:
            return (t.abs() / v[:, None]).amax()

        step = layer.cell(z, x, scaled, W) - layer.cell(y, x, scaled, W)
        assert norm(step) <= certificate.contraction * norm(z - y) + 1e-12


def test_two_starts_and_the_lipschitz_bound() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        layer, graph = random_layer(4, 0.9), random_graph(8)
        certificate = layer.certificate(graph)
        x, y = (torch.randn(8, 4, dtype=torch.float64) for _ in range(2))
        layer.init = None
        one = layer.solve(x, graph)
        layer.init = lambda x, _: 10 * torch.randn_like(x)
        two, other = layer.solve(x, graph), layer.solve(y, graph)
        assert one.converged and two.converged
        assert (one.value - two.value).abs().max() < 1e-6
        v = certificate.weight[:, None]
        assert ((one.value - other.value).abs() / v).max() <= certificate.lipschitz * ((x - y).abs() / v).max() + 1e-6


def test_the_certificate_survives_1000_steps_with_a_large_learning_rate() -> None:
    layer, graph = random_layer(4, 0.9), random_graph(6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(1000):
        optimizer.zero_grad()
        W = layer.cell.linear.weight
        (W @ torch.randn(4, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert layer.certificate(graph).contraction <= 0.9 + 1e-9
    assert layer.solve(x, graph).converged


@pytest.mark.parametrize("sparse", [False, True])
def test_a_solution_is_one_whatever_the_layout_and_its_gradient_agrees_with_finite_differences(sparse: bool) -> None:
    layer, graph = random_layer(3, 0.8), random_graph(5) + 0.1
    layer.solver = ti.Newton(rtol=1e-14)
    given = graph.to_sparse() if sparse else graph
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    z = layer(x, given)
    W = layer.cell.linear.weight
    right = torch.tanh(graph / perron(graph)[0] @ z @ W.mT + x)
    assert (z - right).abs().max() < 1e-10
    original = layer.cell.linear.parametrizations.weight.original  # type: ignore[union-attr]

    def of(x: Tensor, original: Tensor) -> Tensor:
        state = {"cell.linear.parametrizations.weight.original": original}
        return torch.func.functional_call(layer, state, (x, given))

    assert torch.autograd.gradcheck(of, (x, original), fast_mode=True)


def test_the_gradient_with_respect_to_the_graph_includes_its_normalisation() -> None:
    layer = random_layer(3, 0.8)
    layer.solver = ti.Newton(rtol=1e-14)
    x = torch.randn(5, 3, dtype=torch.float64)
    graph = (random_graph(5) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda graph: layer(x, graph), graph, fast_mode=True)


def test_the_closed_form_solves_its_equation_and_agrees_with_iteration() -> None:
    for seed in range(15):
        torch.manual_seed(seed)
        layer = InfiniteGraph(4, gamma=0.9, dtype=torch.float64)
        S = normalize_adjacency(random_graph(7))
        x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
        z = layer(x, S)
        assert (z - (0.9 * S @ z @ layer.g() + x)).abs().max() < 1e-12
        assert (layer(x, layer.spectrum(S)) - z).abs().max() < 1e-12
        iterated = x
        for _ in range(400):
            iterated = 0.9 * S @ iterated @ layer.g() + x
        assert (iterated - z).abs().max() < 1e-10
        certificate = layer.certificate()
        assert certificate.contraction <= 0.9 + 1e-12
        y = torch.randn_like(x)
        assert (layer(y, S) - z).norm() <= certificate.lipschitz * (y - x).norm() * (1 + 1e-12)


def test_the_closed_forms_derivatives_agree_with_finite_differences_where_eigenvalues_coincide() -> None:
    layer = InfiniteGraph(3, dtype=torch.float64)
    S = normalize_adjacency(torch.ones(5, 5, dtype=torch.float64))  # eigenvalues 1, 0, 0, 0, 0
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    F = torch.eye(3, dtype=torch.float64, requires_grad=True)  # all eigenvalues of g(F) coincide

    def of(x: Tensor, F: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"F": F}, (x, S))

    assert torch.autograd.gradcheck(of, (x, F))
    assert torch.autograd.gradgradcheck(of, (x, F), fast_mode=True)


def test_normalised_adjacencies_agree_dense_and_sparse_and_stay_in_the_unit_interval() -> None:
    for loops in (True, False):
        graph = random_graph(9, 0.3)
        dense = normalize_adjacency(graph, loops)
        assert (normalize_adjacency(graph.to_sparse(), loops).to_dense() - dense).abs().max() < 1e-15
        assert torch.linalg.eigvalsh(dense).abs().max() <= 1 + 1e-12
    pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert torch.allclose(normalize_adjacency(pair), torch.full((2, 2), 0.5))


def test_graphs_and_options_that_do_not_fit_are_refused() -> None:
    layer = InfiniteGraph(3, dtype=torch.float64)
    x, S = torch.zeros(4, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="symmetric"):
        layer(x, S.roll(1, 0))
    with pytest.raises(ValueError, match="eigenvalue 2"):
        layer(x, 2 * S)
    with pytest.raises(ValueError, match="no gradient"):
        layer(x, S.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"must be \(4, 4\)"):
        ImplicitGraph(3)(x.float(), torch.eye(5))
    with pytest.raises(ValueError, match="did you mean 'tanh'"):
        ImplicitGraph(3, activation="tanhh")
    with pytest.raises(ValueError, match=r"kappa=1\.0"):
        ImplicitGraph(3, kappa=1.0)
    with pytest.raises(TypeError, match="did you mean 'kappa'"):
        ImplicitGraph(3, kapa=0.5)  # type: ignore[call-arg]
