"""`train mnist --compiled`: the same run in other last digits; refused where there are no compiled loops."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Command


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]


@pytest.mark.compiler
@pytest.mark.parametrize("layer", ["picard", "newton"])
def test_a_run_is_the_same_but_for_rounding(layer: str, small_run: Command, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("compiled", ("--compiled",))):
        assert small_run("--layer", layer, "--epochs", 1, "--out", tmp_path / name, *options).exit_code == 0
    plain, compiled = _lines(tmp_path / "plain"), _lines(tmp_path / "compiled")
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
    assert compiled != plain
    assert json.loads((tmp_path / "compiled" / "config.json").read_text())["options"]["compiled"] is True
    refused = small_run("--layer", layer, "--epochs", 1, "--out", tmp_path / "compiled", "--resume")
    assert refused.exit_code == 2 and "--compiled: the run in" in refused.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layer", "anderson"), "--compiled: there are compiled loops for picard and newton, not for anderson"),
        (("--precision", "bf16"), "--compiled: the loops compute in float32 on the cpu, not in bf16 on cpu"),
    ],
    ids=["anderson", "bf16"],
)
def test_refused(options: tuple[str, ...], message: str, small_run: Command, tmp_path: Path) -> None:
    refused = small_run("--epochs", 1, "--out", tmp_path / "run", "--compiled", *options)
    assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())
    assert not (tmp_path / "run").exists()
