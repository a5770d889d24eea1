"""What the examples on images rely on: the blur and its transpose, distortions, PSNR, the twin."""

import pytest
import torch

import torchimplicit as ti
from examples._digits import batches, distort, shift
from examples.deblur import ProximalStep, psnr
from examples.residual_deq import Once, network
from examples.tutorial import what_goes_wrong
from torchimplicit.experiments.data import Split


def test_the_blur_is_its_own_transpose_and_no_expansion() -> None:
    step = ProximalStep().double()
    a, b = torch.randn(2, 3, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close((step.blur(a) * b).sum(), (a * step.blur(b)).sum())
    z = a
    for _ in range(50):
        z = step.blur(z) / step.blur(z).norm()
    assert 0.5 < step.blur(z).norm() < 1.0


def test_the_first_proximal_step_contracts_to_the_closed_form() -> None:
    """With `N = 0`: `z = a (z − A(A z − y))`, linear, so that `((1 − a) I + a A²) z = a A y`."""
    step = ProximalStep().double()
    y = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    solution = ti.fixed_point(step, y, y, batch_dims=1, solver=ti.Anderson(rtol=1e-12))
    identity = torch.eye(81, dtype=torch.float64).reshape(81, 1, 9, 9)
    A = step.blur(identity).reshape(81, 81)
    a = step.keep.item()
    system = (1 - a) * torch.eye(81, dtype=torch.float64) + a * A @ A
    expected = torch.linalg.solve(system, a * A @ y.reshape(2, 81).T).T.reshape(y.shape)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-9)


def test_no_distortion_returns_the_image_and_a_move_moves_it() -> None:
    images = torch.rand(4, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    same = distort(images, generator, turn=0.0, grow=0.0, move=0.0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
    dot = torch.zeros(64, 1, 28, 28)
    dot[:, :, 14, 14] = 1.0
    moved = distort(dot, generator, turn=0.0, grow=0.0, move=2.0)
    place = torch.arange(28.0)
    rows = (moved.sum((1, 3)) * place).sum(1) / moved.sum((1, 2, 3))
    assert (rows - 14).abs().max() <= 2.0 + 1e-3
    assert (rows - 14).abs().max() > 1.0


def test_psnr_of_a_known_error() -> None:
    truth = torch.zeros(2, 1, 4, 4)
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_a_shift_moves_each_image_by_whole_pixels_and_loses_none_within() -> None:
    dot = torch.zeros(200, 1, 28, 28)
    dot[:, :, 14, 10] = 1.0
    moved = shift(dot, 2)
    assert moved.shape == dot.shape
    places = moved.nonzero()[:, 2:] - torch.tensor([14, 10])
    assert len(places) == 200
    assert sorted({(int(r), int(c)) for r, c in places}) == [(r, c) for r in range(-2, 3) for c in range(-2, 3)]


def test_batches_are_those_of_the_generator_and_keep_the_odd_rest_if_asked() -> None:
    split = Split(torch.arange(10)[:, None, None].expand(10, 28, 28).to(torch.uint8), torch.arange(10))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    drawn = list(batches(split, 4, torch.Generator().manual_seed(3), odd=True))
    assert torch.cat([labels for _, labels in drawn]).tolist() == order.tolist()
    assert [tuple(images.shape) for images, _ in drawn] == [(4, 1, 28, 28), (4, 1, 28, 28), (2, 1, 28, 28)]
    assert [len(labels) for _, labels in batches(split, 4, torch.Generator().manual_seed(3))] == [4, 4]
    assert [len(labels) for _, labels in batches(split, 4)] == [4, 4, 2]


def test_the_network_is_within_the_budget_and_its_twin_has_the_same_parameters() -> None:
    model, twin = network(), network(implicit=False)
    shapes = [{name.replace("1.cell", "1"): p.shape for name, p in m.named_parameters()} for m in (model, twin)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in model.parameters()) == 39226
    assert isinstance(twin[1], Once)
    assert model.eval()(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_tutorial_shows_what_it_says() -> None:
    shown = what_goes_wrong()
    memory, company, failure = shown["memory"], shown["company"], shown["failure"]
    assert memory["kept by the notebook, bytes"] > 50 * memory["kept by the library, bytes"]
    assert company["the notebook's answers differ by"] > 20 * company["the library's by"]
    assert failure["notebook's fixed point: median residual of what it returns"] > 1.0
    assert failure["Picard: share called converged"] == 0.0
    assert failure["Auto: share called converged"] == 1.0
    assert failure["Auto: largest residual among them"] < 1e-4
