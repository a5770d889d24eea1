"""The folder of one run: its `config.json`, its growing `*.jsonl` files, and who may write there."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import torchimplicit as ti
from torchimplicit.experiments.config import TrainConfig, option
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import to_json, write_atomically

CONFIG = "config.json"
METRICS = "metrics.jsonl"
BATCHES = "batches.jsonl"
ANALYSIS = "analysis.json"
REPORT = "report.html"


def environment() -> dict[str, Any]:
    """Versions and machine, for `config.json`."""
    return {
        "torchimplicit": ti.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def create(folder: Path, config: TrainConfig, data: dict[str, Any], launch: str = "") -> None:
    """Make a new run folder with its `config.json`; a folder with anything in it is refused.

    `launch` is torchrun's name for the launch, by which it knows its own run again when it has to restart it.
    """
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"--out: '{folder}' is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ExperimentError(
            f"--out: '{folder}' is not empty; add --resume to go on with the run in it, or name another folder"
        )
    content: dict[str, Any] = {"options": config.as_dict(), "data": data, "environment": environment()}
    if launch:
        content["launch"] = launch
    write_atomically(folder / CONFIG, (to_json(content, indent=2) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not {"options", "data", "environment"} <= content.keys():
            raise ValueError("parts are missing")
    except FileNotFoundError as error:
        raise ExperimentError(
            f"'{folder}' holds no run (no {CONFIG}); name the folder that a run was written to"
        ) from error
    except (ValueError, AttributeError) as error:
        raise ExperimentError(f"{path}: damaged ({error})") from error
    return content


def check_resumable(folder: Path, config: TrainConfig, data_checksum: str) -> None:
    """Refuse to go on with a run under options or data that differ from those it began with."""
    if not (folder / CONFIG).exists():
        raise ExperimentError(f"--resume: no run to go on with in '{folder}'; leave out --resume to start one there")
    began = read_config(folder)
    for name, value in config.as_dict().items():
        # A run of a version that did not have the option yet went without.
        before = began["options"].get(name, getattr(TrainConfig, name))
        if before != value:
            raise ExperimentError(
                f"{option(name)}: the run in '{folder}' began with {before}, not {value}; "
                f"resume with {before}, or start a new run with another --out"
            )
    if began["data"]["checksum"] != data_checksum:
        raise ExperimentError(
            f"--data-dir: the run in '{folder}' began with other data ({began['data']['source']}); "
            "name the same data again"
        )


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one of the `*.jsonl` files; none if it is not there yet."""
    path = folder / name
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ExperimentError(f"{path}: damaged ({error})") from error


class JsonLines:
    """A file that grows by one JSON line at a time and can be cut back to where a checkpoint knew it."""

    def __init__(self, path: Path, length: int) -> None:
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise ExperimentError(
                f"{path}: {size} bytes, but the checkpoint knows {length}; the file was cut short, put "
                "it back from a copy or start a new run with another --out"
            )
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(length)
        self._file.seek(length)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Add one line (buffered until `sync`)."""
        self._file.write(to_json(record).encode() + b"\n")

    def sync(self) -> int:
        """Put every line on the disk and return the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()
