"""Chains of 100 nodes whose class only the first node knows: `python -m examples.graph_chains`.

Implicit graph layers, which hear all nodes of a graph however large it is, against ten layers of a GCN, which hear ten.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record

FEATURES, CLASSES, CHAINS = 16, 2, 20


class GCN(nn.Module):
    """Ten graph convolutions: the explicit twin."""

    def __init__(self, depth: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(depth))

    def forward(self, x: Tensor, S: Tensor) -> Tensor:
        """`(B, n, d)` to `(B, n, d)`."""
        for layer in self.layers:
            x = torch.relu(S @ layer(x))
        return x


class Classifier(nn.Module):
    """A linear map in, a graph layer, a linear map of the direction of each node's state out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.read_in = nn.Linear(CLASSES, FEATURES, bias=False)
        self.layer = layer
        self.read_out = nn.Linear(FEATURES, CLASSES)

    def forward(self, features: Tensor, S: Tensor, meter: Meter | None = None) -> Tensor:
        """Scores of every node."""
        x = self.read_in(features)
        implicit = isinstance(self.layer, ti.nn.ImplicitGraph)
        z = meter.see(self.layer.solve(x, S)) if implicit and meter is not None else self.layer(x, S)
        # The state decays along the chain by many orders of magnitude; its direction is what tells (as in EIGNN).
        return self.read_out(functional.normalize(z, dim=-1, eps=1e-300))


def data(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels, the graph of a chain, and which nodes are trained on: 10 % of them, drawn at random."""
    torch.manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(CHAINS)[:, None].expand(-1, length)
    features = torch.zeros(CLASSES * CHAINS, length, CLASSES)
    features[:, 0] = functional.one_hot(labels[:, 0], CLASSES).to(features.dtype)
    link = torch.diag(torch.ones(length - 1), 1)
    return features, labels, ti.nn.normalize_adjacency(link + link.mT), torch.rand(labels.shape) < 0.1


def run(layer: nn.Module, length: int, seed: int, epochs: int, name: str) -> dict[str, float]:
    """Train one layer; its accuracy on the other nodes, and what it cost."""
    features, labels, S, known = data(length, seed)
    model, meter = Classifier(layer), Meter()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    with progress(f"{name}, length {length}, seed {seed}", epochs) as advance:
        for _ in range(epochs):
            loss = functional.cross_entropy(model(features, S, meter)[known], labels[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(f"loss {loss.item():.4f}")
    with torch.no_grad():
        right = (model(features, S).argmax(-1) == labels)[~known].double().mean().item()
    return {"accuracy": right, "parameters": parameters(model), **meter.figures()}


def implicit() -> nn.Module:
    """IGNN; W begins near κI: a random one lets nothing through 100 nodes."""
    layer = ti.nn.ImplicitGraph(
        FEATURES,
        kappa=0.99,
        activation="tanh",
        adjoint=ti.Implicit(linear_solver=ti.GMRES(restart=120, max_steps=600)),
    )
    layer.cell.linear.weight = 0.99 * torch.eye(FEATURES)
    return layer


def infinite() -> nn.Module:
    """EIGNN; F begins near a matrix of rank one, for which g(F) lets the most through."""
    layer = ti.nn.InfiniteGraph(FEATURES, gamma=0.99)
    with torch.no_grad():
        layer.F.copy_(torch.ones_like(layer.F) + 0.1 * torch.randn_like(layer.F))
    return layer


LAYERS = {"IGNN": implicit, "EIGNN": infinite, "GCN, ten layers": GCN}
EXPERIMENT = Experiment(
    name="graph_chains",
    title="Chains of 100 nodes",
    metric="accuracy",
    unit="fraction",
    ours="IGNN",
    twin="GCN, ten layers",
    models={"IGNN": "decays with the length", "EIGNN": "about 100 % at length 100", "GCN, ten layers": "fails"},
    bar=0.99,
    literature="EIGNN about 100 % at length 100, where IGNN decays and a GCN fails",
    source="Liu et al. 2021 (from memory)",
    notes=(
        "accuracy: of the nodes that were not trained on, two classes",
        "IGNN: ti.nn.ImplicitGraph; EIGNN: ti.nn.InfiniteGraph, which has a closed form and nothing to iterate",
        "float64: the signal falls below 1e-7 of itself on the way. W and F start where it gets through",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    return options(argv, __doc__ or "", smoke={"length": 20}, epochs=16, length=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Every layer, and the record."""
    chosen = command_line(argv)
    torch.set_default_dtype(torch.float64)
    record = Record.open(EXPERIMENT, chosen)
    for seed in chosen.seeds:
        found = {}
        for name in ("GCN, ten layers", "EIGNN", "IGNN"):
            torch.manual_seed(seed)
            found[name] = run(LAYERS[name](), chosen.length, seed, chosen.epochs, name)
            record.add(name, seed, **found[name])
        sane(chosen, "IGNN right on more than 95 % of the nodes", found["IGNN"]["accuracy"] > 0.95)
    with figure(chosen.out, "graph_chains", width=4.5, height=3.2) as axes:
        for name, runs in record.models.items():
            axes.plot([name] * len(runs), [r["accuracy"] for r in runs], "o", color="C0")
        axes.axhline(0.5, color="grey", ls=":")
        axes.set(ylabel=f"accuracy, chains of {chosen.length} nodes", ylim=(0.4, 1.03))


if __name__ == "__main__":
    main()
