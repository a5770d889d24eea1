"""What is kept of the measurements: a record per row with its circumstances, in results.json; and the verdicts."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import to_json, write_atomically

RESULTS = "results.json"

Outcome = Literal["measured", "failed", "missing"]


@dataclass(frozen=True)
class Record:
    """A row as it was last measured, or not.

    Attributes:
        name: of the row.
        title: in words.
        bar: or None.
        unit: of the value.
        outcome: "measured"; "failed", and `detail` says how; "missing", a peer is not installed.
        measurement: if measured.
        detail: otherwise.
        date: UTC.
        command: that repeats it.
        versions: of Python, torch, this package and the peers that the row needs.
        processor: as the system names it.
        threads: always one.
        took: seconds.
    """

    name: str
    title: str
    bar: float | None
    unit: str
    outcome: Outcome
    measurement: Measurement | None = None
    detail: str = ""
    date: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    processor: str = ""
    threads: int = 1
    took: float = 0.0

    def changed(
        self, outcome: Outcome, detail: str = "", measurement: Measurement | None = None, took: float = 0.0
    ) -> "Record":
        """The same row with another outcome."""
        return replace(self, outcome=outcome, detail=detail, measurement=measurement, took=took)

    @property
    def verdict(self) -> str:
        """`met`, `MISSED`, `NOT VERIFIED`, `FAILED`, `not measured`, or `no bar`."""
        if self.outcome == "missing":
            return "not measured"
        if self.outcome == "failed" or self.measurement is None:
            return "FAILED"
        if not self.measurement.verified:
            return "NOT VERIFIED"
        if self.bar is None:
            return "no bar"
        return "met" if self.measurement.value <= self.bar else "MISSED"


def blank_record(row: Row, settings: Settings) -> Record:
    """A record of the circumstances, to be filled in."""
    return Record(
        row.name,
        row.title,
        row.bar,
        row.unit,
        "failed",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(row, settings),
        versions=_versions(("torch", "torchimplicit", *row.needs)),
        processor=processor(),
    )


def _command(row: Row, settings: Settings) -> str:
    """The command that repeats a row; folders of this machine are left out."""
    parts = ["torchimplicit", "bench", row.name, "--repeats", str(settings.repeats), "--seed", str(settings.seed)]
    parts += ["--quick"] if settings.quick else []
    parts += ["--data-dir", "DIR"] if settings.data_dir else []
    return " ".join(parts)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """Name the processor as the system does."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def merge(old: Mapping[str, Record], new: Mapping[str, Record], order: Sequence[str]) -> dict[str, Record]:
    """The records of both, the new ones first in right; in the order of the rows, and only of rows there are.

    A row that could not be measured for lack of a peer does not take the place of an older measurement.
    """
    merged = dict(old)
    for name, record in new.items():
        if record.outcome != "missing" or name not in old:
            merged[name] = record
    return {name: merged[name] for name in order if name in merged}


def read(path: Path) -> dict[str, Record]:
    """The records in a results.json; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
        return {name: _record(name, entry) for name, entry in told["rows"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"--out: {path} is not a results file of this command ({error}); move it away") from error


def _record(name: str, entry: dict[str, Any]) -> Record:
    entry = dict(entry)
    entry.pop("verdict", None)
    measurement = entry.pop("measurement")
    return Record(name, **entry, measurement=Measurement(**measurement) if measurement else None)


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Write results.json, whole or not at all."""
    rows = {}
    for name, record in records.items():
        entry = asdict(record)
        del entry["name"]
        rows[name] = {"verdict": record.verdict} | entry
    write_atomically(path, (to_json({"rows": rows}, indent=1) + "\n").encode())


def summary_measurement(records: Mapping[str, Record], names: Sequence[str]) -> Measurement | None:
    """The median of the values of some rows; None if none was measured. It is verified if all of them are there."""
    found = [records[name].measurement for name in names if name in records]
    values = [m.value for m in found if m is not None]
    if not values:
        return None
    verified = len(values) == len(names) and all(m is not None and m.verified for m in found)
    evidence = {"rows": len(names), "measured": len(values)}
    return Measurement(median(values), min(values), max(values), len(values), None, None, verified, evidence)
