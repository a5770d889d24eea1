"""Measuring rows one after the other, each in a process of its own: what breaks one does not break the others."""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from torchimplicit.experiments.bench.results import Record, blank_record
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.worker import ENVIRONMENT, settings_to_json

WORKER = (sys.executable, "-m", "torchimplicit.experiments.bench.worker")


def measure(row: Row, settings: Settings, limit: float, worker: tuple[str, ...] = WORKER) -> Record:
    """Measure a row in a new process.

    Args:
        row: which.
        settings: of the run.
        limit: seconds after which it is given up.
        worker: the command that is given the row's name, the settings and a file for the measurement.

    Returns:
        The record: "measured", "failed" (it crashed, or took too long), or "missing" (a peer is not installed).
    """
    blank = blank_record(row, settings)
    missing = [name for name in row.needs if find_spec(name) is None]
    if missing:
        return blank.changed(outcome="missing", detail=f"no {', '.join(missing)}: install torchimplicit[bench]")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measurement.json"
        command = [*worker, row.name, settings_to_json(settings), str(file)]
        try:
            done = subprocess.run(
                command,
                env=os.environ | ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return blank.changed(outcome="failed", detail=f"gave up after {limit:g} s", took=limit)
        took = time.monotonic() - began
        if done.returncode != 0 or not file.is_file():
            return blank.changed(outcome="failed", detail=_last_words(done), took=took)
        measurement = Measurement(**json.loads(file.read_text()))
    if measurement.value is None:  # NaN and infinity are null in JSON
        return blank.changed(outcome="failed", detail="the value is not a finite number", took=took)
    return blank.changed(outcome="measured", measurement=measurement, took=took)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The error in one line: that of the traceback, or the exit status."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # The lines that end a traceback are not indented; the last of them names the error.
    named = [line for line in done.stderr.splitlines() if line[:1].isalpha() and ":" in line]
    words = named[-1] if named else lines[-1] if lines else "no message"
    return f"exit status {done.returncode}: {words[:300]}"
