"""The benchmark house: rows are chosen by name, timed in turns, kept side by side; a miss is shown as a miss."""

import json
import sys
from pathlib import Path

import pytest

from torchimplicit.experiments.bench import registry, report, results, runner
from torchimplicit.experiments.bench.race import race
from torchimplicit.experiments.bench.results import Record
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.worker import settings_from_json, settings_to_json
from torchimplicit.experiments.errors import ExperimentError

from .conftest import Command


def _measurement(value: float, *, verified: bool = True) -> Measurement:
    return Measurement(value, value / 2, 2 * value, 5, 1.0, 2.0, verified, {})


def _record(name: str, value: float | None, bar: float | None = 0.4, *, verified: bool = True) -> Record:
    measurement = None if value is None else _measurement(value, verified=verified)
    outcome = "failed" if value is None else "measured"
    return Record(name, "a title", bar, "ratio", outcome, measurement, "it broke" if value is None else "")


def _row(name: str, needs: tuple[str, ...] = ()) -> Row:
    return Row(name, "a title", 0.5, lambda _: _measurement(1.0), needs=needs)


# --- names ------------------------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    names = [row.name for row in registry.ROWS] + [summary.name for summary in registry.SUMMARIES]
    assert len(names) == len(set(names))


def test_summaries_name_rows_there_are() -> None:
    names = {row.name for row in registry.ROWS}
    assert all(names.issuperset(summary.rows) for summary in registry.SUMMARIES)


def test_rows_are_chosen_by_name_and_by_pattern_in_their_order() -> None:
    rows = [_row("a/1"), _row("b/1"), _row("a/2")]
    assert [row.name for row in registry.select(["a/2", "a/*"], rows)] == ["a/1", "a/2"]
    assert [row.name for row in registry.select([], rows)] == ["a/1", "b/1", "a/2"]


def test_the_name_of_a_summary_stands_for_its_rows() -> None:
    assert {row.name for row in registry.select(["torchdeq/median"])} == set(registry.SUMMARIES[0].rows)


def test_an_unknown_row_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ExperimentError, match=r"'torchdeq/picard/tanh-100'; did you mean torchdeq/picard/tanh-100/0.7"):
        registry.select(["torchdeq/picard/tanh-100"])


def test_the_command_names_an_unknown_row_in_one_line(run: Command, tmp_path: Path) -> None:
    result = run("bench", "scipy/newtn", "--out", tmp_path / "out")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "did you mean scipy/newton" in line
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_file_for_its_folder_before_it_measures(run: Command, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_text("kept")
    result = run("bench", "memory/steps", "--out", place)
    assert result.exit_code == 2
    assert result.stderr == f"error: --out: '{place}' is a file; name a folder\n"
    assert place.read_text() == "kept"


def test_the_list_shows_rows_and_bars(run: Command) -> None:
    text = run("bench", "--list").output
    for row in registry.ROWS:
        assert row.name in text
    assert "≤ 0.25" in text


# --- timing -----------------------------------------------------------------------------------------------------


class _Clock:
    """Stands still, unless a contender moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> tuple[str, object]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return name, run


def test_contenders_are_timed_in_turns_and_the_order_is_reversed_each_round() -> None:
    clock = _Clock()
    contenders = dict([clock.contender("a", 1.0), clock.contender("b", 4.0)])
    found = race(contenders, 3, least=0.5, clock=clock, cpu_clock=clock)  # type: ignore[arg-type]
    assert clock.calls == ["a", "a", "a", "b", "b", "b", *"ab", *"ba", *"ab"]
    assert found.ratio("a", "b").median == found.cpu_ratio("a", "b").median == 0.25


def test_a_quick_contender_is_called_often_enough_to_be_timed() -> None:
    clock = _Clock()
    found = race(dict([clock.contender("a", 0.25)]), 2, least=1.0, clock=clock, cpu_clock=clock)  # type: ignore[arg-type]
    assert len(clock.calls) == 3 + 2 * 4
    assert found.median("a") == 0.25


# --- results ----------------------------------------------------------------------------------------------------


def test_a_subset_is_merged_into_what_was_there() -> None:
    old = {"a": _record("a", 0.1), "b": _record("b", 0.2), "gone": _record("gone", 0.3)}
    merged = results.merge(old, {"c": _record("c", 0.5), "a": _record("a", 0.9)}, ["a", "b", "c"])
    assert list(merged) == ["a", "b", "c"]
    assert [record.measurement.value for record in merged.values() if record.measurement] == [0.9, 0.2, 0.5]


def test_a_missing_peer_does_not_take_the_place_of_a_measurement_but_a_failure_does() -> None:
    old = {"a": _record("a", 0.1), "b": _record("b", 0.2)}
    missing = Record("a", "a title", 0.4, "ratio", "missing", detail="install")
    merged = results.merge(old, {"a": missing, "b": _record("b", None)}, ["a", "b"])
    assert [record.verdict for record in merged.values()] == ["met", "FAILED"]


def test_results_survive_the_file(tmp_path: Path) -> None:
    records = {"a": _record("a", 0.1), "b": _record("b", None), "c": _record("c", 0.9, None)}
    results.write(tmp_path / "results.json", records)
    assert results.read(tmp_path / "results.json") == records
    told = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["verdict"] for row in told.values()] == ["met", "FAILED", "no bar"]


def test_a_foreign_results_file_is_an_error_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ExperimentError, match="not a results file"):
        results.read(tmp_path / "results.json")


@pytest.mark.parametrize(
    "record, verdict",
    [
        (_record("a", 0.4), "met"),
        (_record("a", 0.401), "MISSED"),
        (_record("a", 0.1, verified=False), "NOT VERIFIED"),
        (_record("a", 0.1, None, verified=False), "NOT VERIFIED"),
        (_record("a", None), "FAILED"),
        (_record("a", 9.0, None), "no bar"),
    ],
)
def test_verdicts(record: Record, verdict: str) -> None:
    assert record.verdict == verdict


def test_the_report_shows_a_miss_as_a_miss() -> None:
    page = report.make_report({"a": _record("a", 0.3), "b": _record("b", 0.7), "c": _record("c", None)})
    assert "1 met, 1 MISSED, 1 FAILED." in page
    assert "| `b` | ≤ 0.4 | 0.7 (0.35–1.4) | **MISSED** | 5 |" in page
    assert "| `c` | ≤ 0.4 |  | **FAILED** |  | it broke |" in page


def test_the_median_of_rows_is_verified_only_when_all_of_them_are() -> None:
    summary = registry.SUMMARIES[0]
    values = [0.1 + 0.01 * i for i in range(len(summary.rows))]
    records = {name: _record(name, value) for name, value in zip(summary.rows, values, strict=True)}
    found = report.with_summaries(records)[summary.name]
    assert found.measurement is not None
    assert found.measurement.value == pytest.approx((values[8] + values[9]) / 2)
    assert found.verdict == "met"
    del records[summary.rows[3]]
    assert report.with_summaries(records)[summary.name].verdict == "NOT VERIFIED"


# --- processes --------------------------------------------------------------------------------------------------


def _worker(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_crash_is_recorded_with_its_last_words() -> None:
    record = runner.measure(_row("a"), Settings(), 60, _worker("raise ValueError('the sky is falling')"))
    assert record.verdict == "FAILED"
    assert record.detail == "exit status 1: ValueError: the sky is falling"


def test_a_row_that_takes_too_long_is_given_up() -> None:
    record = runner.measure(_row("a"), Settings(), 0.5, _worker("import time; time.sleep(60)"))
    assert record.verdict == "FAILED"
    assert "gave up after 0.5 s" in record.detail


def test_a_missing_peer_is_named_with_what_to_install() -> None:
    record = runner.measure(_row("a", needs=("no_such_peer",)), Settings(), 60, _worker("raise SystemExit(3)"))
    assert record.verdict == "not measured"
    assert record.detail == "no no_such_peer: install torchimplicit[bench]"


def test_the_measurement_comes_back_with_its_circumstances() -> None:
    written = json.dumps(_measurement(0.25).__dict__)
    code = f"import os, sys; assert os.environ['OMP_NUM_THREADS'] == '1'; open(sys.argv[3], 'w').write({written!r})"
    record = runner.measure(_row("a"), Settings(repeats=5, data_dir=Path("/here")), 60, _worker(code))
    assert record.measurement == _measurement(0.25)
    assert record.verdict == "met"
    assert record.command == "torchimplicit bench a --repeats 5 --seed 0 --data-dir DIR"
    assert record.versions.keys() == {"python", "torch", "torchimplicit"}
    assert record.date
    assert record.processor


def test_a_value_that_is_no_number_is_a_failure() -> None:
    written = json.dumps(_measurement(0.25).__dict__ | {"value": None})
    record = runner.measure(
        _row("a"), Settings(), 60, _worker(f"import sys; open(sys.argv[3], 'w').write({written!r})")
    )
    assert record.verdict == "FAILED"
    assert record.detail == "the value is not a finite number"


def test_settings_reach_the_other_process() -> None:
    settings = Settings(3, True, 7, Path("/data"))
    assert settings_from_json(settings_to_json(settings)) == settings
    assert settings_from_json(settings_to_json(Settings())) == Settings()
