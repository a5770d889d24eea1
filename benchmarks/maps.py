"""Fixed-point maps that stand for what people solve: linear and not, normal and not, cheap and dear, one trained."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchimplicit.experiments.data import load_digits
from torchimplicit.experiments.recipe import make_model


@dataclass(frozen=True)
class Map:
    """A map `z ← fn(z, *args)` of a batch, and where to start.

    Attributes:
        name: for tables.
        fn: the map.
        z0: the start, `(B, ...)`.
        args: inputs that have the batch in front.
    """

    name: str
    fn: Callable[..., Tensor]
    z0: Tensor
    args: tuple[Tensor, ...]


def maps() -> list[Map]:
    """All of them; the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [
        *(_symmetric(gamma, generator) for gamma in (0.5, 0.8, 0.9, 0.95, 0.99)),
        _rotation(generator),
        _triangular(generator),
        _tanh("tanh .7", 1500, 0.7, generator),
        _tanh("tanh .95", 1500, 0.95, generator),
        _tanh("tanh 1.3", 1500, 1.3, generator),
        _poisson(),
        _convolution(generator),
        _attention(generator),
        _spread(generator),
        _trained(),
    ]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _linear(name: str, matrix: Tensor, x: Tensor) -> Map:
    return Map(name, lambda z, x: torch.addmm(x, z, matrix), torch.zeros_like(x), (x,))


def _symmetric(gamma: float, generator: torch.Generator, n: int = 1500, batch: int = 32) -> Map:
    basis = torch.linalg.qr(_normal(generator, n, n))[0]
    matrix = (basis * torch.linspace(-gamma, gamma, n)) @ basis.T
    return _linear(f"symmetric {gamma:g}", matrix, _normal(generator, batch, n))


def _rotation(generator: torch.Generator, n: int = 1500, batch: int = 32) -> Map:
    """`ρ Q` with Q orthogonal: all eigenvalues on a circle, nothing for a Krylov method to find."""
    return _linear("rotation .9", 0.9 * torch.linalg.qr(_normal(generator, n, n))[0], _normal(generator, batch, n))


def _triangular(generator: torch.Generator, n: int = 1500, batch: int = 32) -> Map:
    """Triangular: ρ = 0.7, and a residual that grows before it falls."""
    matrix = torch.triu(_normal(generator, n, n), 1) * (1.0 / n**0.5) + torch.diag(torch.linspace(-0.7, 0.7, n))
    return _linear("non-normal .7", matrix, _normal(generator, batch, n))


def _tanh(name: str, n: int, contraction: float, generator: torch.Generator, batch: int = 32) -> Map:
    weight = _normal(generator, n, n) * (contraction / n**0.5)  # the circular law: ρ(W) is nearly the contraction
    x = _normal(generator, batch, n)
    return Map(name, lambda z, x: torch.tanh(torch.addmm(x, z, weight.T)), torch.zeros_like(x), (x,))


def _poisson(side: int = 48, batch: int = 16) -> Map:
    """Damped Jacobi's iteration for −Δu + 10 u = f: ρ = 0.98."""
    x = torch.ones(batch, 1, side, side)
    kernel = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]])
    h2 = 1.0 / (side + 1) ** 2

    def fn(u: Tensor, f: Tensor) -> Tensor:
        return (nn.functional.conv2d(u, kernel, padding=1) + h2 * f) / (4 + 80 * h2)

    return Map("Poisson", fn, torch.zeros_like(x), (x,))


def _convolution(generator: torch.Generator, channels: int = 32, side: int = 16, batch: int = 16) -> Map:
    """A residual cell of two convolutions, as in equilibrium models of images."""
    first = _normal(generator, channels, channels, 3, 3) * 0.5 / (9 * channels) ** 0.5
    second = _normal(generator, channels, channels, 3, 3) * 0.9 / (9 * channels) ** 0.5
    x = _normal(generator, batch, channels, side, side)

    def fn(z: Tensor, x: Tensor) -> Tensor:
        inner = torch.relu(nn.functional.conv2d(z, first, padding=1) + x)
        return torch.tanh(nn.functional.conv2d(inner, second, padding=1) + x)

    return Map("convolution", fn, torch.zeros_like(x), (x,))


def _attention(generator: torch.Generator, length: int = 64, width: int = 128, batch: int = 8) -> Map:
    """Self-attention with the input injected, normalised in each token."""
    query, key, value = (_normal(generator, width, width) / width**0.5 for _ in range(3))
    x = _normal(generator, batch, length, width)

    def fn(z: Tensor, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(z @ query, z @ key, 0.5 * z @ value)
        return nn.functional.layer_norm(mixed + x, (width,))

    return Map("attention", fn, torch.zeros_like(x), (x,))


def _spread(generator: torch.Generator, batch: int = 200, n: int = 400) -> Map:
    """Samples whose contraction lies anywhere between 0.2 and 0.98."""
    factor = torch.linspace(0.2, 0.98, batch)[torch.randperm(batch, generator=generator)][:, None]
    rotation = torch.linalg.qr(_normal(generator, n, n))[0]
    x = _normal(generator, batch, n)
    return Map("spread", lambda z, f, x: f * torch.sin(z @ rotation) + x, torch.zeros_like(x), (factor, x))


def _trained(batches: int = 200, batch: int = 100) -> Map:
    """The layer of the MNIST job after some training, on a batch that it was not trained on."""
    digits = load_digits(None)
    torch.manual_seed(0)
    model = make_model("anderson")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(batches):
        images, labels = digits.train.batch(torch.arange(i * batch, (i + 1) * batch) % len(digits.train))
        optimiser.zero_grad()
        with torch.enable_grad():
            nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    x = model[1](model[0](digits.test.batch(slice(0, batch))[0]))
    cell: nn.Module = model[2].get_submodule("cell").requires_grad_(False)
    return Map("trained MNIST", lambda z, x: cell(z, x), torch.zeros_like(x), (x,))  # without its closed form
