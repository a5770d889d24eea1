"""`path_independence`: 1 where there is one solution, below where there are several; and random starts teach it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti


def test_contraction_has_the_score_one() -> None:
    layer, x = ti.nn.TanhEquilibrium(6, solver=ti.Picard(rtol=1e-6)), torch.randn(5, 6)
    with torch.no_grad():
        layer.linear.weight.copy_(0.7 * torch.linalg.qr(layer.linear.weight).Q)
    found = ti.path_independence(layer, x)
    assert found.cosine.shape == (5,)
    assert found.converged.all()
    assert 1 - found.score < 1e-6
    assert found.distance.max() < 1e-4


def test_bistable_map_has_the_cosine_of_its_two_solutions() -> None:
    """`z = tanh(2 z)` from (.5, .3) and (−.5, .2): the limits (a, a) and (−a, a) are orthogonal."""
    x = torch.tensor([[0.5, 0.3], [-0.5, 0.2], [0.5, 0.1]], dtype=torch.float64)
    layer = ti.nn.FixedPoint(lambda z, x: torch.tanh(2 * z) + 0 * x, init=lambda x: x, solver=ti.Picard())
    found = ti.path_independence(layer, x)
    # Each begins at the solution of the one before it: the first at the third's, (a, a), which is its own.
    torch.testing.assert_close(found.cosine, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    root_of_two = 2**0.5
    expected = torch.tensor([0.0, root_of_two, root_of_two], dtype=torch.float64)
    torch.testing.assert_close(found.distance, expected, rtol=0, atol=1e-5)
    assert found.score == pytest.approx(1 / 3, abs=1e-6)


def test_distance_sees_what_the_cosine_does_not() -> None:
    """Solutions at 1 and 3, of one sign."""
    layer = ti.nn.FixedPoint(lambda z, x: z - (z - 1) * (z - 2) * (z - 3) * 0.4, init=lambda x: x, solver=ti.Picard())
    found = ti.path_independence(layer, torch.tensor([[0.9], [3.1]]))
    torch.testing.assert_close(found.cosine, torch.ones(2))
    torch.testing.assert_close(found.distance, torch.full((2,), 2 / 3), rtol=1e-3, atol=0)


def test_solutions_that_are_zero_agree_with_zero_and_with_nothing_else() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 0.5 * z, init=lambda x: 0 * x)
    found = ti.path_independence(layer, torch.ones(2, 3))
    assert found.cosine.tolist() == [1.0, 1.0] and found.distance.tolist() == [0.0, 0.0]
    held = ti.nn.FixedPoint(lambda z, x: z, init=lambda x: x)  # every point is a solution
    found = ti.path_independence(held, torch.tensor([[0.0], [1.0]]))
    assert found.cosine.tolist() == [0.0, 0.0] and found.distance.tolist() == [1.0, 1.0]


def test_solves_that_fail_are_marked_and_nobody_is_warned() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 3 * z + x, solver=ti.Picard(), on_failure="raise")
    found = ti.path_independence(layer, torch.ones(2, 3))
    assert found.converged.tolist() == [False, False]
    assert layer.on_failure == "raise"


def _trained(init: Any) -> tuple[float, float]:
    """Loss and score after training `z = tanh(w z + g x)` to amplify its inputs.

    By w, which makes it bistable, or by g, which does not: from zero both will do.
    """
    torch.manual_seed(1)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.w * z + self.gain * x)

    layer = ti.nn.FixedPoint(Cell(), init=init, solver=ti.Picard(rtol=1e-4), on_failure="ignore")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = 0.3 * torch.randn(64, 4)
    target = 0.9 * x.sign()
    for _ in range(50):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.init = None
    with torch.no_grad():
        loss = (layer(x) - target).square().mean().item()
        far = 2 * torch.randn(2, 64, 4)
        one, other = (layer.solve(x, start=start).value for start in far)
    return loss, nn.functional.cosine_similarity(one, other).mean().item()


def test_random_starts_in_training_make_a_layer_independent_of_its_start() -> None:
    (plain_loss, plain), (random_loss, random) = _trained(None), _trained(ti.nn.RandomStart(std=2.0))
    assert plain < 0.6
    assert random > 0.9
    assert plain_loss < 0.02 and random_loss < 0.02


def test_memories_and_random_numbers_stay_as_they_were() -> None:
    memory = ti.nn.Previous()
    layer, x = ti.nn.TanhEquilibrium(3, init=memory), torch.randn(4, 3)
    layer(x)
    kept, before = memory._value, torch.get_rng_state()
    found = ti.path_independence(layer, 2 * x)
    assert memory._value is kept
    assert found.score > 0.999
    layer.init = ti.nn.RandomStart()
    ti.path_independence(layer, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_than_two_samples_and_no_layers_are_refused() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with pytest.raises(ValueError, match="a batch of 1"):
        ti.path_independence(layer, torch.ones(1, 3))
    with pytest.raises(TypeError, match="is Linear"):
        ti.path_independence(nn.Linear(2, 2), torch.ones(2, 2))
