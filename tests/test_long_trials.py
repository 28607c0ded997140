"""scripts/long_trials.py and scripts/peers_transfer.py: what is planned, kept, and reported."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from extend.errors import TrainingError
from extend.model_config import RopeSpec
from extend.rope.frequencies import inv_freq
from extend.rope.methods import apply_method

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

import long_trials
import peers_transfer
from long_lab import report, work
from long_lab.levels import LEVELS, make_plan
from long_lab.plan import GROUPS, Phase, list_units, parse_phases, train_seconds
from transfer_lab.claims import Clock

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "docs/results/long-trials/tiny/results.json"
SMOLLM2 = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192)


@pytest.fixture()
def plan(tmp_path):
    return make_plan("tiny", tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The recorded run, laid out again in an empty folder."""
    out = tmp_path_factory.mktemp("long")
    report.restore(out, RECORDED)
    return out


# ---- the plan ------------------------------------------------------------------------------------

def test_every_schedule_of_smollm2_is_a_rope_for_one_million(tmp_path):
    ropes = make_plan("smollm2", tmp_path).ropes
    assert list(ropes) == ["yarn-1.1", "yarn-1.2", "by-parts", "merge-safe", "critical", "ntk",
                           "gradient-v1", "yarn"]
    for name, rope in ropes.items():
        spec = apply_method(rope["method"], SMOLLM2, 2**20, dict(rope.get("options", {})))
        slowest = float(inv_freq(SMOLLM2)[-1] / inv_freq(spec)[-1])
        assert slowest > 100, name  # it was made for 128 times the native length


def test_phases_are_read():
    assert parse_phases("32k:64,128k:2:5e-5:4") == (
        Phase(32768, 64, 1e-4, 1), Phase(131072, 2, 5e-5, 4))


def test_units_come_in_their_order_and_once(plan):
    units = list(list_units(plan))
    assert len({unit.name for unit in units}) == len(units)
    order = [GROUPS.index(unit.group) for unit in units if unit.group != "short"]
    assert order == sorted(order)
    one_row = next(unit for unit in units if unit.group == "grid-text").tasks[0]
    assert one_row["trials"] == 1 and one_row["lengths"] == list(plan.far)


def test_rows_of_the_first_phase_reach_the_target_by_skipping(plan, tmp_path):
    shop = work.Workshop(plan, tmp_path, 0)
    first, later, whole = (shop._phase(Phase(n, 1, 1e-4), skips=skips)
                           for n, skips in ((512, True), (512, False), (plan.target, True)))
    assert first["position_span"] == first["rope_to"] == later["rope_to"] == plan.target
    assert "position_span" not in later | whole


# ---- doing units ---------------------------------------------------------------------------------

def test_what_does_not_fit_is_passed_over_and_what_fails_is_told(plan, tmp_path, monkeypatch):
    long, short, broken = (replace(next(list_units(plan)), label=name, seconds=s)
                           for name, s in (("long", 1e6), ("short", 1), ("broken", 1)))
    done = []

    def run(shop, unit, commit):
        if unit.label == "broken":
            raise OSError("no disk")
        done.append(unit.label)

    monkeypatch.setattr(work, "run_unit", run)
    shop = work.Workshop(plan, tmp_path, 0)
    left = work.run_units(shop, [long, broken, short], Clock(None), "c")
    assert done == ["long", "short"] and left == ["short/broken (error above)"]
    left = work.run_units(shop, [long, short], Clock(time.time() + 1000), "c")
    assert done == ["long", "short", "short"] and left == ["short/long (1000000 s)"]


def test_a_model_costs_nothing_once_it_is_there(plan, tmp_path):
    shop = work.Workshop(plan, tmp_path, 0)
    key = ("merged", "by-parts", "16", "record")
    assert shop.needs(key) == [("adapter", "by-parts", "16"), ("sibling", "record")]
    before = shop.seconds(key)
    shop.path(("long", "by-parts")).mkdir(parents=True)
    assert before - shop.seconds(key) == pytest.approx(train_seconds(plan))
    assert shop.needs(("adapter", "by-parts", "noise")) == [("bf16", "by-parts")]


def test_a_training_that_a_signal_stopped_ends_the_run(plan, tmp_path, monkeypatch):
    def run(shop, unit, commit):
        raise TrainingError("stopped by a signal after step 3 of 35; it is saved in x.state")

    monkeypatch.setattr(work, "run_unit", run)
    units = list(list_units(plan))[:3]
    left = work.run_units(work.Workshop(plan, tmp_path, 0), units, Clock(None), "c")
    assert left == [f"{unit.name} (stopped by a signal)" for unit in units]


# ---- reporting -----------------------------------------------------------------------------------

def test_the_recorded_run_gives_its_tables_and_plots_again(recorded, capsys):
    assert long_trials.main(["--level", "tiny", "--out", str(recorded), "--collect"]) == 0
    made = [Path(line) for line in capsys.readouterr().out.split()]
    assert {path.name for path in made} >= {"results.json", "table.md", "ranks.png",
                                            "heatmap-passkey-stream-text.png"}
    assert all(path.stat().st_size > 0 for path in made)
    again = json.loads((recorded / "results.json").read_text())["units"]
    known = json.loads(RECORDED.read_text())["units"]
    assert {u["label"]: u["summary"] for u in again} == {u["label"]: u["summary"] for u in known}
    text = (recorded / "table.md").read_text()
    for title in ("## Short text", "## The adapter by rank", "## Loss by position"):
        assert title in text


def test_finished_measures_are_not_done_again(recorded, plan):
    done = {path.parent for path in recorded.glob("results/*/*/unit.json")}
    units = list(list_units(plan))
    left = work.open_units(units, recorded, None)
    assert len(left) == len(units) - sum(work.unit_path(recorded, u) in done for u in units)
    assert done and not [u for u in left if work.unit_path(recorded, u) in done]


def test_a_folder_without_results_says_so(tmp_path, plan):
    with pytest.raises(SystemExit, match="holds no results"):
        report.collect(tmp_path, plan)


def test_an_unknown_schedule_is_named_with_the_known(tmp_path):
    with pytest.raises(SystemExit, match="pose is no schedule here; they are by-parts"):
        long_trials.main(["--level", "tiny", "--out", str(tmp_path), "--schedules", "pose"])
    assert set(LEVELS) == {"tiny", "smollm2"}


# ---- peers ---------------------------------------------------------------------------------------

def peers(out, *more):
    return ["--base", "b", "--long", str(ROOT / "assets/demo/base"), "--target", "one=t", "--docs",
            "d", "--prose", "p", "--lengths", "256", "--out", str(out), *more]


def test_a_tool_that_fails_is_in_the_table(tmp_path, capsys):
    args = peers_transfer.parse(peers(tmp_path))
    peers_transfer.run_tool(args, tmp_path / "adapters/mergekit", ["-c", "raise OSError('full')"])
    assert peers_transfer.main(peers(tmp_path, "--stage", "collect")) == 0
    assert "failed: OSError: full" in (tmp_path / "table.md").read_text()
    peers_transfer.run_tool(args, tmp_path / "adapters/mergekit", ["-c", "pass"])  # not again
    assert "OSError" in json.loads((tmp_path / "adapters/mergekit.json").read_text())["log"]


def test_rope_is_copied_beside_and_not_into_the_merge(tmp_path):
    long, merged = tmp_path / "long", tmp_path / "merged"
    for folder, config in ((long, {"rope_theta": 5.0, "max_position_embeddings": 64, "a": 1}),
                           (merged, {"rope_theta": 1.0, "rope_scaling": None, "a": 2})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    (merged / "model.safetensors").write_bytes(b"weights")
    peers_transfer.with_rope(merged, tmp_path / "merged+rope", long)
    assert json.loads((tmp_path / "merged+rope/config.json").read_text()) == {
        "rope_theta": 5.0, "max_position_embeddings": 64, "a": 2}
    assert json.loads((merged / "config.json").read_text())["rope_theta"] == 1.0
    assert (tmp_path / "merged+rope/model.safetensors").read_bytes() == b"weights"
