"""The scripts of load and of numbers over time: small samples, and that what they look for is seen.

The large ones are recorded in docs/results/reliability/.
"""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import check_regressions  # noqa: E402
from load_check import evaluation, record, training  # noqa: E402
from regressions.measure import SECTIONS, Value, cpu_seconds, error  # noqa: E402

from extend.rope import frequencies  # noqa: E402


def check(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str, **values: Value) -> int:
    monkeypatch.setitem(SECTIONS, "made up", lambda _: values)
    return check_regressions.main(["--only", "made up", "--recorded", str(file), *arguments])


@pytest.mark.parametrize(("planted", "name"), [
    ({"exact": error(2e-3, 1e-6)}, "exact"), ({"slow": cpu_seconds(1.3)}, "slow"),
    ({"few": Value(70.0, "", 0.25, more_is_better=True)}, "few"),
    ({"exact": error(float("nan"), 1e-6)}, "exact")])
def test_a_planted_regression_is_seen(planted, name, tmp_path, monkeypatch, capsys):
    file = tmp_path / "recorded.json"
    good = {"exact": error(1e-3, 1e-6), "slow": cpu_seconds(1.0),
            "few": Value(100.0, "", 0.25, more_is_better=True)}
    assert check(monkeypatch, file, **good) == 0  # nothing is recorded
    assert check(monkeypatch, file, "--record", **good) == 0
    assert check(monkeypatch, file, **good) == 0
    capsys.readouterr()
    assert check(monkeypatch, file, **good | planted) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if line.endswith("REGRESSION")]
    assert [line.partition(":")[0] for line in bad] == [name]


def test_a_speed_of_another_machine_is_told_and_an_error_counts(tmp_path, monkeypatch, capsys):
    file = tmp_path / "recorded.json"
    check(monkeypatch, file, "--record", slow=cpu_seconds(1.0), exact=error(1e-3, 1e-6))
    monkeypatch.setattr(check_regressions, "hardware", lambda: "another")
    assert check(monkeypatch, file, slow=cpu_seconds(9.0)) == 0
    assert "slow: 9 CPU s, recorded 1, at most 1.25; not compared" in capsys.readouterr().out
    assert check(monkeypatch, file, exact=error(9e-3, 1e-6)) == 1


def test_a_section_that_fails_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SECTIONS, "made up", lambda _: 1 / 0)
    assert check_regressions.main(["--only", "made up", "--recorded", str(tmp_path / "r")]) == 1
    assert "made up: cannot be measured" in capsys.readouterr().out


def test_wrong_frequencies_are_seen_against_what_is_recorded(monkeypatch, capsys):
    """The oracle itself, with one frequency of every kind off by a part in a billion."""
    assert check_regressions.main(["--only", "rope"]) == 0
    right = frequencies.inv_freq

    def wrong(*arguments):
        found = right(*arguments)
        found[3] *= 1 + 1e-9
        return found

    monkeypatch.setattr(frequencies, "inv_freq", wrong)
    capsys.readouterr()
    assert check_regressions.main(["--only", "rope"]) == 1
    assert capsys.readouterr().out.count("REGRESSION") == 3


def test_every_recorded_value_is_measured_still():
    """One whose name has changed would never be compared again."""
    recorded = json.loads(check_regressions.RECORDED.read_text())
    assert {key.partition(",")[0].split(" of ")[0] for key in recorded} >= {"ring", "rope"}
    for name, entry in recorded.items():
        assert {"value", "tolerance", "machine", "commit"} <= entry.keys(), name


def test_memory_that_grows_and_steps_that_are_missing_are_seen(tmp_path):
    long = tmp_path / "out" / "long"
    long.mkdir(parents=True)
    (tmp_path / "log.txt").write_text("log")
    (long / "training.png").write_bytes(b"png")
    (long.parent / "index.html").write_text("<svg></svg>")
    lines = [json.dumps({"step": step}) for step in range(1, 11)]
    (long / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    flat = {step: 500_000_000 + step for step in range(1, 11)}
    assert training.judge(tmp_path, 10, 0, flat, 1.0)[1] == []
    grown = {step: 500_000_000 + 10_000_000 * step for step in range(1, 11)}
    assert "resident memory grew by 15" in training.judge(tmp_path, 10, 0, grown, 1.0)[1][0]
    assert "one line a step" in training.judge(tmp_path, 11, 0, flat, 1.0)[1][0]


def test_rows_of_an_evaluation_are_kept_and_drawn_in_pages_of_bounded_size(tmp_path):
    """240 rows, in the way of the large check."""
    found = evaluation._measure(tmp_path / "w", 240)
    assert found["index.html of the run, bytes"] < 200_000
    text = (tmp_path / "w" / "report" / "index.html").read_text()
    assert "data:image/png" not in text and text.count("<rect") >= 240


def test_results_are_kept_beside_those_of_other_checks(tmp_path):
    record.save(tmp_path, "train", "command", {"steps": 10}, [])
    record.save(tmp_path, "merge", "command", {"peak": {"bytes": 3_000}}, ["too much"])
    kept = json.loads((tmp_path / "load.json").read_text())
    assert {name: check["passed"] for name, check in kept.items()} == {"train": True,
                                                                       "merge": False}
    text = (tmp_path / "load.md").read_text()
    assert "## merge: FAILED" in text and "- failed: too much" in text and "bytes 3,000" in text
