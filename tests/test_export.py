"""torch.export and ONNX: an implicit layer with a solver that can be traced is a part of the exported graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.data import load_embedded
from torchimplicit.experiments.recipe import make_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

BATCH = torch.export.Dim("batch")


def trained(layer: str) -> tuple[nn.Module, Tensor]:
    """A small classifier after a few steps on real digits, and images that it has not seen."""
    digits = load_embedded()
    model = make_model(layer, features=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(20):
        images, labels = digits.train.batch(slice(i * 100, i * 100 + 100))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), digits.test.batch(slice(0, 50))[0]


@pytest.mark.parametrize("layer", ["picard", "anderson"])
def test_a_trained_classifier_is_exported_saved_and_run_by_onnxruntime(layer: str, tmp_path: Path) -> None:
    import onnxruntime

    model, images = trained(layer)
    program = torch.export.export(model, (images[:4],), dynamic_shapes=({0: BATCH},))
    torch.export.save(program, tmp_path / "model.pt2")
    onnx = torch.onnx.export(model, (images[:4],), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    assert onnx is not None
    onnx.save(tmp_path / "model.onnx")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (images, images[:7]):
            wanted = model(batch)
            torch.testing.assert_close(program.module()(batch), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(loaded(batch), wanted, rtol=0, atol=1e-5)
            (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=0, atol=1e-5)
            assert wanted.abs().max() > 0.1


class Evidence(nn.Module):
    """A layer's solution with its evidence."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        solution = self.layer.solve(x)
        return solution.value, solution.status, solution.steps


def test_the_evidence_is_exported() -> None:
    layer = ti.nn.TanhEquilibrium(4, solver=ti.Anderson(), max_steps=9, on_failure="ignore", dtype=torch.float64)
    model, x = Evidence(layer).eval(), torch.randn(5, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},)).module()
    with torch.no_grad():
        for batch in (x, 10 * torch.randn(8, 4, dtype=torch.float64)):
            for found, wanted in zip(program(batch), model(batch), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson()], ids=lambda solver: type(solver).__name__)
def test_a_gradient_of_an_exported_program_is_an_error(solver: Any) -> None:
    layer = ti.nn.TanhEquilibrium(4, solver=solver).eval()
    x = torch.randn(3, 4)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            program = torch.export.export(layer, (x,)).module()
        value = program(x.requires_grad_())
        torch.testing.assert_close(value.detach(), layer(x).detach(), rtol=0, atol=1e-6)
        with pytest.raises(RuntimeError, match="floor_divide is not implemented"):
            value.sum().backward()


def test_what_cannot_be_exported_says_what_to_do() -> None:
    x = torch.randn(3, 4)
    layer = ti.nn.TanhEquilibrium(4)
    with pytest.raises(RuntimeError, match=r"solver=Auto\(...\) cannot; use Picard"):
        torch.export.export(layer, (x,))
    layer.solver = ti.Newton()
    with pytest.raises(RuntimeError, match="use Picard"):
        torch.export.export(layer, (x,))
    layer.solver, layer.on_failure = ti.Picard(), "raise"
    with pytest.raises(RuntimeError, match="converged"):
        torch.export.export(layer, (x,))
    noisy = ti.nn.FixedPoint(nn.RNNCell(4, 4), solver=ti.Picard())
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        torch.export.export(noisy, (x,))


def test_a_memory_stays_out_of_an_exported_program() -> None:
    layer = ti.nn.TanhEquilibrium(4, solver=ti.Picard(), init=ti.nn.Previous()).eval()
    x = torch.randn(3, 4)
    program = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer(x), program(x), rtol=0, atol=1e-5)
