"""The page of a run: what it tells, what it names as missing, and what it must never do."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from extend.cli import main
from extend.errors import CheckpointError
from extend.run_page import MOST_BYTES, PAGE_NAME, write_run_page
from tests.page.structure import Structure
from tests.run_page.made_up import HASHES, MadeUp

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&amp;'


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> Path:
    return MadeUp(tmp_path_factory.mktemp("made-up") / "run").whole().out


@pytest.fixture
def whole(pattern, tmp_path) -> MadeUp:
    """A run whose every stage is done; a test may break it."""
    run = MadeUp(tmp_path / "fresh" / "run")
    run.entries = json.loads((pattern / "run.json").read_text())
    run.save()
    shutil.copytree(pattern, run.out, dirs_exist_ok=True)
    return run


def read(run: MadeUp) -> str:
    """The page's text without its marks, after its structure is checked."""
    page = write_run_page(run.out).read_text(encoding="utf-8")
    Structure(page).check(run.out)
    assert len(page.encode()) < MOST_BYTES
    plain = re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(html.unescape(plain).split())


def missing(text: str) -> str:
    """The part that names what is missing."""
    return text.partition("What is missing ")[2].partition("What is missing ")[2].partition(
        " What each stage read and wrote")[0]


def test_it_tells_the_whole_story(whole):
    text = read(whole)
    for told in (
            "9 of 9 stages done nothing is missing", "512 to 2K context, tokens",
            "512 to 2K or more effective length of before and of sibling + adapter",
            "81,920 tokens trained in 1 stage", "5 GiB most memory of a GPU of a host 3 GiB",
            "yarn, factor 4", "1 min 2 s",  # 61.5 seconds
            "loss 3 to 2.025 nats a token", "81,920 in 40 steps",
            "passkey at 2K 0 % 0/15; 0-20 100 % 15/15; 80-100",  # base, then long; Wilson
            "2,048 tokens, depth 0.33: 0 of 5 (0-43 %)",
            "short text, nats a token at 512 2.500 +/- 0.010",
            "mean residual largest 0.2", "0.123", "Left out of the adapter: model.odd.weight",
            "Against the base of adapter the target is a light fine-tune of the base (cosine 0.99)",
            "matrices with a low-rank delta 28", "2 rows moved", HASHES["base"][:12],
            "2 x A GPU", "torch 2.13.0", "not bold"):
        assert told in text, told
    assert HASHES["base"] not in text  # shortened to be read; whole for those who point at it
    assert missing(text) == (
        "merged, conflict of the deltas a merge does not measure it; `extend lineage TARGET --base "
        "BASE --adapter ADAPTER` does plan the run's directory holds no plan.json, so there is "
        "nothing to set against what was measured")


def test_models_stand_side_by_side_and_say_which_they_are(whole):
    page = (write_run_page(whole.out)).read_text()
    labels = re.findall(r'aria-label="passkey heat map of ([^:]*): ([^"]*)"', page)
    assert [label for label, _ in labels] == ["before", "long", "sibling + adapter",
                                              "eval-sibling"]
    assert labels[0][1] == "100 % (15/15; 80-100) at 512, 0 % (0/15; 0-20) at 2K"
    captions = re.findall(r'<figcaption style[^>]*>([^<]*)<span class="soft about">([^<]*)', page)
    assert captions == [("before", "base"), ("long", "long (train)"),
                        ("sibling + adapter", "merged (merge)"),
                        ("eval-sibling", "sibling before the merge")]


def test_ropes_are_drawn_from_their_frequencies(whole):
    page = write_run_page(whole.out).read_text()
    (said,) = re.findall(r'aria-label="(Wavelength[^"]*)"', page)
    # Pair i of 16 turns once in 2 pi 10000^(i/16) tokens; yarn divides the last by its factor.
    assert said == ("Wavelength of each pair, tokens, by pair, fastest first: read by rescaled "
                    "from 6.28 to 35,333; written by rescaled, long from 6.28 to 1.4e5")


def test_hostile_names_are_text(tmp_path):
    run = MadeUp(tmp_path / "run", name=HOSTILE, model=f"/models/{HOSTILE}")
    run.recipe |= {"text": HOSTILE, "path": HOSTILE}
    run.evaluate("eval-base", (run.model, "ab" * 32), 512, tasks=(HOSTILE,))
    run.rescale()
    run.ended("long", "failed", error=f"no such model {HOSTILE}")
    text = read(run)
    assert "{{ 7*7 }}" in text and "49" not in text
    page = (run.out / PAGE_NAME).read_text()
    assert "<script" not in page and "<img" not in page
    assert page.count("alert(1)&lt;/script&gt;") > 5


FAILED = "rank is 999, larger than every matrix"


def test_a_run_that_stopped_halfway(tmp_path):
    run = MadeUp(tmp_path / "run")
    run.evaluate("eval-base", ("/models/base", HASHES["base"]), 512)
    run.evaluate("eval-sibling", ("/models/sibling", HASHES["sibling"]), 512)
    run.rescale()
    run.train()
    run.ended("adapter", "failed", error=FAILED, ended="2026-11-28T10:05:07+00:00")
    text = read(run)
    assert f"This run is not whole. adapter (extract), failed: {FAILED}" in text
    assert "4 of 9 stages done adapter: failed" in text
    assert "5. adapter extract failed 7 s" in text and "6. merged merge not reached -" in text
    assert "Score" in text and "loss 3 to 2.025" in text
    for named in (f"adapter (extract) {FAILED}", "merged (merge) the run has not reached it",
                  "eval-merged (eval) the run has not reached it"):
        assert named in missing(text)


@pytest.mark.parametrize("state, words, why", [
    ("running", "not finished", "it was started, and had not ended when this page was written"),
    ("interrupted", "interrupted", "it was stopped by hand")])
def test_a_training_that_has_not_ended_is_drawn_as_far_as_it_got(state, words, why, tmp_path):
    run = MadeUp(tmp_path / "run")
    run.rescale()
    run.metrics(11, "long.state/metrics.jsonl")
    run.ended("long", state, starts=2)
    text = read(run)
    assert f"long (train), {words}: {why}" in text and "(2 starts in all), not ended" in text
    assert "The training is not finished: this is its course up to step 11." in text
    assert "long, the rest of its training it had reached step 11" in missing(text)


def test_an_output_of_an_earlier_start_is_not_shown_as_this_ones(whole):
    whole.ended("merged", "failed", error="disk full")
    whole.entries["eval-merged"]["state"] = "unchecked"
    whole.save()
    text = read(whole)
    assert "a light fine-tune" not in text and "merged (merge) disk full" in missing(text)
    assert "eval-merged (eval), done before: a stage before it has run again since" in text


@pytest.mark.parametrize("damage, named", [
    (lambda out: (out / "adapter" / "report.json").unlink(),
     "adapter, its spectra cannot be shown"),
    (lambda out: (out / "long" / "metrics.jsonl").write_text("{"), "long, its curves cannot be"),
    (lambda out: (out / "eval-long" / "results.json").write_text('{"schema": 9}'),
     "eval-long, its results cannot be shown: {out}/eval-long/results.json: is not results of"),
    (lambda out: (out / "merged" / "manifest.json").write_text("[]"), "merged"),
    (lambda out: (out / "recipe.json").unlink(), "recipe the run is of a version that did not"),
    (lambda out: shutil.rmtree(out / "adapter"),
     "adapter (extract) it was done, but its output is not there any more"),
    (lambda out: (out / "plan.json").write_text("{}"), "plan cannot be shown: KeyError: 'stages'")])
def test_what_cannot_be_shown_is_named_and_the_rest_is_there(damage, named, whole):
    damage(whole.out)
    text = read(whole)
    assert named.format(out=whole.out) in missing(text)
    assert "512 to 2K context, tokens" in text and "2 x A GPU" in text


def test_a_file_that_changed_is_told(whole):
    os.truncate(whole.out / "long" / "metrics.jsonl", 3000)
    (whole.out / "adapter" / "report.html").write_text("shorter")
    assert "adapter (extract), done: its output report.html is missing or was changed" in read(
        whole)


LONG_PLAN = {"name": "long", "seconds": 123.0, "gpu_bytes": 2 * 2**30, "host_bytes": None,
             "writes_bytes": 1000}


@pytest.mark.parametrize("assumed, cells", [
    (False, "long 1 min 2 s planned 2 min 3 s, x 0.5 5 GiB planned 2 GiB, x 2.5 3 GiB not planned"),
    (True, "long 1 min 2 s planned 2 min 3 s 5 GiB planned 2 GiB 3 GiB not planned")])
def test_planned_stands_beside_measured(assumed, cells, whole):
    """A plan for GPUs that were only assumed says nothing of what was measured without them."""
    whole.write("plan.json", {
        "stages": [LONG_PLAN], "machine": {"gpu": "h200", "gpus": 8, "assumed": assumed},
        "time": {"seconds": 123.0, "seconds_range": [100.0, 150.0]}, "problems": ["no disk"]})
    text = read(whole)
    assert cells in text and "The plan is for 8 x H200" in text and "no disk" in text
    assert ("which was assumed" in text) == assumed
    assert "All stages: 2 min 3 s (1 min 40 s to 2 min 30 s)." in text
    assert "plan" not in missing(text)


def test_a_plan_that_could_not_be_made_is_named(whole):
    whole.write("plan.json", {"stages": [], "problems": ["the plan could not be made: why"]})
    assert "plan the plan could not be made: why" in missing(read(whole))


def test_a_large_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("extend.run_page.evaluations.MOST_CELLS", 200)
    run = MadeUp(tmp_path / "run")
    lengths = tuple(1024 * (i + 1) for i in range(12))
    run.evaluate("eval-base", ("/models/base", HASHES["base"]), 8192, lengths, 10,
                 ("passkey", "needle"))
    run.train(3_000, step_1234=777.0)
    run.extract(60)
    text = read(run)
    assert "needle, its heat maps they have 120 squares, and the page holds 200" in text
    assert "Scores of needle at 12 lengths" in text
    assert "Of every 16 steps the lowest and the highest are drawn" in text
    page = (run.out / PAGE_NAME).read_text()
    chart = page.partition("<figcaption>norm of the gradient</figcaption>")[2]
    heights = [float(p.split(",")[1]) for p in re.search(
        r'polyline points="([^"]*)"', chart)[1].split()]
    assert min(heights) < 25 < 180 < sorted(heights)[1] and len(heights) <= 402
    assert "spectra of 24 of 60 layers are drawn" in text
    assert "a row of the maps is the mean of 2 layers" in text


def test_too_much_together_is_left_to_the_reports_and_named(whole, monkeypatch):
    size = len(write_run_page(whole.out).read_bytes())
    monkeypatch.setattr("extend.run_page.page.MOST_BYTES", size - 1000)
    text = read(whole)
    assert "adapters left to the stages' own reports: with it the page would be larger" in missing(
        text)
    assert "Singular values" not in text and "loss, nats a token" in text
    assert (whole.out / PAGE_NAME).stat().st_size < size - 1000


def test_the_page_is_replaced_in_one_step_and_only_when_it_changes(whole, monkeypatch):
    path = write_run_page(whole.out)
    before = path.stat()
    assert write_run_page(whole.out).stat().st_mtime_ns == before.st_mtime_ns
    whole.ended("report", "failed", error="no")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(CheckpointError, match=r"index\.html: cannot be written \(full\)"):
            write_run_page(whole.out)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not list(whole.out.glob(".*"))
    write_run_page(whole.out)
    assert path.stat().st_ino != before.st_ino


def test_a_page_of_somebody_else_is_left_alone(whole):
    (whole.out / PAGE_NAME).write_text("<html>my thesis")
    with pytest.raises(CheckpointError, match="was not written by `extend run`"):
        write_run_page(whole.out)
    assert (whole.out / PAGE_NAME).read_text() == "<html>my thesis"


def test_command(whole, tmp_path):
    result = CliRunner().invoke(main, ["run-page", str(whole.out), "--json"])
    assert json.loads(result.stdout) == {"output": str(whole.out / PAGE_NAME)}
    result = CliRunner().invoke(main, ["run-page", str(tmp_path)])
    assert result.exit_code == 1 and "holds no run.json; give the --out of" in result.stderr
