"""What the examples on images rely on: the blur and its transpose, distortions, PSNR, the record, the twin."""

import json
from pathlib import Path

import pytest
import torch

import torchimplicit as ti
from examples import _residual as shared
from examples.deblur import ProximalStep
from examples.residual_deq import Once, network
from examples.tutorial import what_goes_wrong


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
    same = shared.distort(images, generator, turn=0.0, grow=0.0, move=0.0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
    dot = torch.zeros(64, 1, 28, 28)
    dot[:, :, 14, 14] = 1.0
    moved = shared.distort(dot, generator, turn=0.0, grow=0.0, move=2.0)
    place = torch.arange(28.0)
    rows = (moved.sum((1, 3)) * place).sum(1) / moved.sum((1, 2, 3))
    assert (rows - 14).abs().max() <= 2.0 + 1e-3
    assert (rows - 14).abs().max() > 1.0


def test_psnr_of_a_known_error() -> None:
    truth = torch.zeros(2, 1, 4, 4)
    assert shared.psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_the_record_has_mean_deviation_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "HERE", tmp_path)
    row = shared.Row("ours", "accuracy", 10, "99 (source)")
    row.add(98.0, seconds=1.0)
    row.add(99.0, seconds=3.0)
    content = json.loads(shared.save_result("name", "Title", [0, 1], [row], ["note"]).read_text())
    assert content["rows"][0]["figures"]["accuracy"] == {"mean": 98.5, "sd": 0.707107, "values": [98.0, 99.0]}
    assert content["rows"][0]["figures"]["seconds"]["mean"] == 2.0
    assert content["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(content)


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
