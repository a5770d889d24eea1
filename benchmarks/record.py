"""How a measurement is written down: with its date, versions, machine and command, as JSON under benchmarks/results."""

import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from torchimplicit.experiments.data import DATA_VARIABLE, Digits

RESULTS = Path(__file__).parent / "results"


def circumstances(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Collect what a reader needs in order to repeat the measurement; folders of this machine are left out."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", module, *_without_folders(arguments)]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def _without_folders(arguments: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for argument in arguments:
        name, is_assignment, _ = argument.partition("=")
        if shown and shown[-1] in ("--data-dir", "--out"):
            shown[-1:] = [shown[-1], "DIR"]
        elif is_assignment and name in ("--data-dir", "--out"):
            shown.append(f"{name}=DIR")
        else:
            shown.append(argument)
    return shown


def processor() -> str:
    """Name the processor as the system does."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def data_used(digits: Digits) -> dict[str, Any]:
    """Say which data a measurement used, by size and checksum."""
    return {"train": len(digits.train), "test": len(digits.test), "sha256": digits.checksum()}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write `result` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    print(f"written: {path}", file=sys.stderr)


__all__ = ["DATA_VARIABLE", "RESULTS", "circumstances", "data_used", "processor", "write"]
