"""`report.html`: whole, self-contained, and true to the run's files."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchimplicit.experiments.decay import layer_solve, residual_decay, start_residual

from .conftest import Command


class Page(HTMLParser):
    """The tags of a page, with the check that they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, `newton` and `explicit`."""
    from typer.testing import CliRunner

    from torchimplicit.experiments.cli import app

    folder = tmp_path_factory.mktemp("runs")
    for layer in ("newton", "explicit"):
        arguments = ["train", "mnist", "--layer", layer, "--data-dir", small_data, "--out", folder / layer]
        arguments += ["--epochs", 2, "--batch-size", 20, "--threads", 1]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    return folder


def test_the_page_needs_nothing_from_outside(runs: Path) -> None:
    text = (runs / "newton" / "report.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    for outside in ("http:", "https:", "//", "@import", "url(http"):
        pictures_removed = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
        assert outside not in pictures_removed, outside


def test_the_page_holds_every_figure(runs: Path) -> None:
    page = Page((runs / "newton" / "report.html").read_text())
    labels = [attributes["aria-label"] or "" for attributes in page.named("svg")]
    for title in ("Error", "Loss", "Iterations", "Converged", "Evaluations of the cell", "Time", "Residual on one"):
        assert any(label.startswith(title) for label in labels), title
    assert len(labels) == 7


def test_the_misclassified_digits_are_pictures(runs: Path) -> None:
    text = (runs / "newton" / "report.html").read_text()
    digits = json.loads((runs / "newton" / "analysis.json").read_text())["digits"]
    assert digits["wrong"] > 0
    pictures = Page(text).named("img")
    assert len(pictures) == len(digits["shown"]) == min(24, digits["wrong"])
    for picture, digit in zip(pictures, digits["shown"], strict=True):
        content = base64.b64decode((picture["src"] or "").split(",")[1])
        assert content.startswith(b"\x89PNG")
        assert digit["true"] != digit["predicted"]
        assert f"true <b>{digit['true']}</b>, said <b>{digit['predicted']}</b>" in text
    last = json.loads((runs / "newton" / "metrics.jsonl").read_text().splitlines()[-1])
    assert digits["wrong"] / digits["of"] == pytest.approx(last["test_error"] / 100)


def test_each_solver_falls_to_the_tolerance_on_the_trained_weights(runs: Path) -> None:
    decays = json.loads((runs / "newton" / "analysis.json").read_text())["decay"]
    assert [decay["solver"] for decay in decays] == ["picard", "anderson", "newton"]
    for decay in decays:
        assert decay["converged"] == 1.0
        assert decay["residuals"][-1] <= 1e-4 < decay["residuals"][0]
        assert decay["evaluations"] == sorted(decay["evaluations"])
        assert decay["steps"][-1] == decay["iterations"]
    newton, picard = decays[2], decays[0]
    assert newton["iterations"] <= picard["iterations"]


def test_the_table_shows_the_metrics(runs: Path) -> None:
    text = (runs / "newton" / "report.html").read_text()
    for line in (runs / "newton" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert f"<td>{row['train_error']:.2f} / {row['test_error']:.2f}</td>" in text
        assert f"<td>{row['evaluations_forward']:,} / {row['evaluations_backward']:,}</td>" in text


def test_the_explicit_twin_has_no_decay(runs: Path) -> None:
    text = (runs / "explicit" / "report.html").read_text()
    assert "No equation was solved" in text
    assert "Residual on one test batch" not in text
    Page(text)


def test_several_runs_lie_over_one_another(run: Command, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    result = run("report", runs / "newton", runs / "explicit", "--out", out)
    assert result.exit_code == 0, result.output
    text = out.read_text()
    page = Page(text)
    for label in ("newton, train", "newton, test", "explicit, train", "explicit, test"):
        assert f">{label}</text>" in text
    assert len([a for a in page.named("svg") if (a["aria-label"] or "").startswith("Error:")]) == 1
    assert text.count("Misclassified digits, ") == 2


def test_runs_of_one_name_are_told_apart(run: Command, runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "newton", tmp_path / "newton")
    out = tmp_path / "both.html"
    assert run("report", runs / "newton", tmp_path / "newton", "--out", out).exit_code == 0
    assert ">newton (1), train</text>" in out.read_text()
    assert ">newton (2), train</text>" in out.read_text()


def test_a_report_can_be_made_anew(run: Command, runs: Path) -> None:
    path = runs / "newton" / "report.html"
    before = path.read_bytes()
    path.unlink()
    assert run("report", runs / "newton").exit_code == 0
    assert path.read_bytes() == before


def test_names_are_escaped(run: Command, runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "newton", tmp_path / "a<b>&c")
    shutil.copytree(runs / "newton", tmp_path / "other")
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "a<b>&c", tmp_path / "other", "--out", out).exit_code == 0
    assert "<b>&c" not in out.read_text()
    assert "a&lt;b&gt;&amp;c" in out.read_text()
    Page(out.read_text())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "RUN: no such folder"),
        (lambda folder: folder.mkdir(), "holds no run (no config.json)"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "config.json: damaged"),
    ],
    ids=["missing", "empty", "damaged"],
)
def test_a_folder_without_a_run_is_named(
    run: Command, tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "run")
    result = run("report", tmp_path / "run")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert message in line


def test_a_run_under_way_can_be_reported(run: Command, runs: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(runs / "newton", tmp_path / "run")
    (folder / "analysis.json").unlink()
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert run("report", folder).exit_code == 0
    text = (folder / "report.html").read_text()
    assert "1 of 2 epochs are done." in text
    assert "Made when a run has come to its end." in text


def test_the_decay_starts_at_zero_and_ends_with_the_solution() -> None:
    import torch

    import torchimplicit as ti

    linear = torch.nn.Linear(8, 8, bias=False).double()
    x = torch.randn(5, 8).double()
    decay = residual_decay(
        "picard", layer_solve(linear, x, ti.Picard(atol=1e-6, rtol=0.0, norm="two")), start_residual(x)
    )
    z, residuals = torch.zeros_like(x), []
    with torch.no_grad():
        for _ in range(decay.iterations + 1):
            residuals.append(float(torch.linalg.vector_norm(torch.tanh(linear(z) + x) - z)))
            z = torch.tanh(linear(z) + x)
    # A row that has converged is frozen, so the whole batch's residual may only be larger, and only within 1e-6 each.
    assert decay.residuals[:5] == pytest.approx(residuals[:5], rel=1e-9)
    assert decay.steps == list(range(decay.iterations + 1))
    assert decay.residuals[-1] <= 1e-6 * 5**0.5
