import json

import pytest

from extend.errors import CheckpointError, RecipeError
from extend.evaluate import report
from extend.evaluate.comparison import TableRow, format_loss, to_markdown
from extend.evaluate.plots import loss_plots
from extend.evaluate.score import proportion
from extend.evaluate.summary import summarize
from extend.results import format_length, format_rate, read_results
from tests.page.reader import Page

HOSTILE = '<script>alert("x")</script> & $x_1$ | `a`'


def make_results(path, native, reach, task="passkey", lengths=(512, 1024), loss=2.0, skill=9):
    rows = []
    for length in lengths:
        for depth in (0.0, 0.5, 1.0):
            correct = 5 if length <= reach else 1
            rows.append({"task": "passkey", "name": task, "length": length, "depth": depth,
                         "control": None, "beyond_native": length > native, "correct": correct,
                         **proportion(correct, 5)})
    rows.append({"task": "passkey", "name": task, "length": 512, "depth": None, "correct": 0,
                 "control": "no-needle", "beyond_native": False, **proportion(0, 5)})
    rows.append({"task": "exact-match", "name": "skill", "length": None, "depth": None,
                 "control": None, "correct": skill, **proportion(skill, 10)})
    rows.append({"task": "loss", "name": "prose", "length": 2048, "depth": None, "control": None,
                 "loss": loss, "stderr": 0.01, "n": 4, "tokens": 8188, "score": None})
    model = {"path": f"/m/{HOSTILE}", "sha256": "ab" * 32, "adapter": None, "dtype": "float32",
             "architecture": "LlamaForCausalLM", "max_position_embeddings": native,
             "rope": {"rope_theta": 1e5, "rotary_dim": 8, "original_len": 512, "scaling": {}},
             "device": "cpu"}
    path.write_text(json.dumps({"schema": 1, "model": model, "summary": summarize(rows),
                                "rows": rows}))
    return path


def test_page_maps_and_table(tmp_path):
    base = make_results(tmp_path / "base.json", 512, 512)
    (tmp_path / "long").mkdir()
    make_results(tmp_path / "long" / "results.json", 1024, 1024, loss=2.02)
    out = report({"base": base, "long": tmp_path / "long"}, tmp_path / "report", title="A title")
    assert out == tmp_path / "report"
    assert sorted(p.name for p in out.iterdir()) == [
        "heatmap-passkey.png", "heatmap-passkey.svg", "index.html", "manifest.json", "report.json",
        "scores-passkey.png", "scores-passkey.svg", "table.md"]
    for plot in ("heatmap-passkey", "scores-passkey"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{plot}.svg").read_text()
    short = "own 100 % at 512, 15 prompts"
    assert (out / "table.md").read_text().splitlines() == [
        "| measure | base | long |", "| --- | --- | --- |",
        f"| effective length, passkey | 512 (by lower ends none; {short}) | 1K or more (by lower "
        f"ends none; {short}) |",
        "| passkey at 512 | 100 % (15/15; 80-100) | 100 % (15/15; 80-100) |",
        "| passkey at 1K | 20 % (3/15; 7-45) | 100 % (15/15; 80-100) |",
        "| passkey, no-needle | 0 % (0/5; 0-43) | 0 % (0/5; 0-43) |",
        "| passkey, 512 is within base's own context | 100 % (15/15; 80-100) | 100 % (15/15; "
        "80-100) |",
        "| skill | 90 % (9/10; 60-98) | 90 % (9/10; 60-98) |",
        "| prose, nats a token at 2K | 2.000 +/- 0.010 | 2.020 +/- 0.010 (+1.00 %) |", "",
        "| less base | long |", "| --- | --- |",
        "| passkey at 512 | +0 points (-20 to +20; n = 15 and 15) |",
        "| passkey at 1K | +80 points (+48 to +93; n = 15 and 15) |",
        "| skill | +0 points (-32 to +32; n = 10 and 10) |",
        "| prose | +0.020 nats (-0.008 to +0.048) |"]
    page = Page((out / "index.html").read_text())
    assert page.tags.count("svg") == 3 and page.tags.count("rect") == 12
    assert page.tags.count("polygon") == page.tags.count("polyline") == 2
    text = " ".join("".join(page.text).split())
    assert "A title" in text and "n = 5 a cell" in text and "+1.00 %" in text
    assert "1,024 tokens, depth 0.50: 1 of 5" in text
    assert "base, 1,024 tokens: 20 % (3/15; 7-45)" in text
    data = json.loads((out / "report.json").read_text())
    assert data["heatmaps"] == {"passkey": "heatmap-passkey.png"}
    assert data["plots"] == [{"kind": "scores", "name": "passkey", "file": "scores-passkey.png"}]
    assert data["results"]["long"]["summary"]["effective_length"] == 1024
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"results.base", "results.long"}


def test_page_loads_nothing_and_hostile_labels_are_text(tmp_path):
    results = make_results(tmp_path / "r.json", 512, 512, task=HOSTILE)
    out = report({HOSTILE: results}, tmp_path / "report", title=HOSTILE)
    page = Page((out / "index.html").read_text())
    assert "script" not in page.tags
    assert page.loads == []
    assert HOSTILE in "".join(page.text)
    table = (out / "table.md").read_text().splitlines()
    assert {line.replace("\\|", "").count("|") for line in table} == {3}
    assert "<script>" not in "".join(table)
    assert json.loads((out / "report.json").read_text())["title"] == HOSTILE
    assert sorted(p.name for p in out.glob("*.png")) == [
        "heatmap-script-alert-x-script-x_1-a.png", "scores-script-alert-x-script-x_1-a.png"]


def test_models_may_have_been_asked_different_things(tmp_path):
    one = make_results(tmp_path / "1.json", 512, 512, lengths=(512,))
    two = make_results(tmp_path / "2.json", 512, 512, lengths=(512, 2048, 300))
    three = make_results(tmp_path / "3.json", 512, 100, task="other")
    out = report({"one": one, "two": two, "three": three}, tmp_path / "report")
    lines = (out / "table.md").read_text().splitlines()
    assert "| passkey at 300 |  | 100 % (15/15; 80-100) |  |" in lines
    other = next(line for line in lines if line.startswith("| effective length, other |"))
    assert other.endswith("|  |  | 1K or more (by lower ends none; own 20 % at 512, 15 prompts) |")
    page = Page((out / "index.html").read_text())
    assert page.tags.count("svg") == 5  # two panels of passkey, one of other, a curve of each
    assert "other: the score at 512, the shortest length asked, is only 20 %" in "".join(page.text)
    assert "300 tokens, depth 0.50: not measured" in "".join(page.text)


def write_rows(path, rows, native=1024, **changes):
    """Results with any rows, of a run with settings."""
    make_results(path, native, native)
    run = {"tasks": [{"task": "x", "name": HOSTILE}], "lengths": [512], "depths": 2, "trials": 5,
           "seed": 0, "template": "auto", "tokenizer": {"sha256": "cd" * 32}, "versions": {},
           "inputs": {"x.text": {"path": HOSTILE, "sha256": "ef" * 32}}}
    data = {**json.loads(path.read_text()), "run": run, "rows": rows,
            "summary": summarize(rows, changes.get("chances"))}
    path.write_text(json.dumps(data))
    return path


def graded(task, length, grades, **other):
    return {"task": task, "name": task, "length": length, "depth": None, "control": None,
            "beyond_native": False, "correct": sum(g == 1 for g in grades), "truncated": 0.0,
            "empty": 0.0, **proportion(sum(grades), len(grades)), **other}


def test_grades_streams_and_losses_by_position(tmp_path):
    curve = [{"begin": 1, "end": 512, "loss": 3.0, "stderr": 0.1, "tokens": 511},
             {"begin": 512, "end": 2048, "loss": 2.5, "stderr": None, "tokens": 1536}]
    loss = {"task": "l", "name": HOSTILE, "length": 2048, "depth": None, "control": None,
            "loss": 2.6, "stderr": 0.1, "n": 1, "tokens": 2047, "score": None}
    rows = [graded("ruler-vt", 512, [1.0, 0.5], truncated=0.5),
            graded("ruler-vt", 1024, [0.5, 0]),
            graded("ruler-cwe", 512, [1.0, 1.0]),
            graded("keys-stream", 512, [0.5, 1.0], depth=0.0, stream=True),
            graded("keys-stream", 512, [1.0] * 2, depth=0.0, control="single-needle"),
            graded("keys-stream", 512, [0.0] * 2, control="base"),
            {**loss, "curve": curve, "slope_per_doubling": -0.25, "slope_stderr": 0.05},
            {**loss, "name": "paired", "slope_per_doubling": 0.01, "slope_stderr": 0.001,
             "short": 256, "excess": 0.02,
             "curve": [{**part, "short_loss": 2.0} for part in curve]},
            {**loss, "name": "far", "kl": 0.03, "kl_stderr": 0.001, "agreement": 0.925}]
    results = write_rows(tmp_path / "r.json", rows, chances={"ruler-vt": 0.125})
    out = report({"long": results}, tmp_path / "report")
    lines = (out / "table.md").read_text().splitlines()
    for line in ("| ruler-vt at 512 | 75 % (n = 2; 20-97) |",
                 "| keys-stream, base | 0 % (n = 2; 0-66) |",
                 "| ruler-vt, cut off and empty | 50 %, 0 % (of 2 at the worst length) |",
                 "| keys-stream, spot check with one fact a prompt | 100 % (n = 2; 34-100) |",
                 "| keys-stream, the stream at the same cells | 75 % (n = 2; 20-97) |",
                 "| effective length, RULER's rule | 512 or more (by lower ends none; 2 of 13 "
                 "tasks) |",
                 "| far, KL in nats a token | 0.0300 +/- 0.0010 (same first choice at 92.50 % of "
                 "2,047 tokens) |"):
        assert line in lines
    assert any(line.endswith("| -0.2500 +/- 0.0500 (mean loss 2.600) |") for line in lines)
    assert ("| paired, nats each time the position doubles | +0.0100 +/- 0.0010 (mean loss 2.600, "
            "+0.020 over windows of 256, whose slope it is) |") in lines
    page = Page((out / "index.html").read_text())
    text = " ".join("".join(page.text).split())
    for said in ("512 tokens, depth 0.00: 0.75, mean of 2", "A streaming grid",
                 "long, tokens 1 to 512: 3.0000 +/- 0.1000 nats over 511 tokens",
                 "ruler-vt at 512: 50 % of 2 answers are cut off", "cd" * 32, HOSTILE,
                 "ruler-vt (long) 12 %"):
        assert said in text
    assert page.loads == [] and "script" not in page.tags
    kinds = [plot["kind"] for plot in json.loads((out / "report.json").read_text())["plots"]]
    assert kinds == ["scores"] * 4 + ["loss"] * 2  # three tasks and RULER's mean


def test_several_models_that_were_read_in_windows_too_are_told_apart_by_what_they_lose(tmp_path):
    curve = [{"begin": 1, "end": 256, "loss": 3.0, "short_loss": 3.0, "excess": 0.0},
             {"begin": 256, "end": 2048, "loss": 2.5, "short_loss": 2.2, "excess": 0.3}]
    row = {"task": "l", "name": "l", "length": 2048, "depth": None, "control": None, "loss": 2.6,
           "stderr": 0.1, "n": 1, "tokens": 2047, "score": None, "short": 256, "excess": 0.2,
           "slope_per_doubling": 0.1, "slope_stderr": 0.01,
           "curve": [{**part, "tokens": 9, "stderr": 0.1, "excess_stderr": 0.01}
                     for part in curve]}
    for labels, want in (("ab", {"a": [0.3], "b": [0.3]}),
                         ("a", {"a": [3.0, 2.5], "a, windows of 256": [3.0, 2.2]})):
        files = {label: write_rows(tmp_path / f"{label}.json", [row]) for label in labels}
        *absolute, plot = loss_plots(read_results(files))
        assert {line.name: [p.y for p in line.points] for line in plot.series} == want
        assert len(absolute) == ("more than in its own windows of 256" in plot.y_label) == (
            len(labels) - 1)
        assert all([p.y for p in line.points] == [3.0, 2.5] for p in absolute for line in p.series)
        assert plot.y_range[0] < 0 or len(labels) == 1
        report(files, tmp_path / f"report-{labels}")


@pytest.mark.parametrize("count", [1, 5])
def test_depth_0_is_on_top_whatever_the_number_of_models(tmp_path, count, monkeypatch):
    from extend.evaluate import heatmap

    limits = []
    draw = heatmap._draw_panel

    def watch(ax, panel):
        image = draw(ax, panel)
        limits.append(ax)
        return image

    monkeypatch.setattr(heatmap, "_draw_panel", watch)
    results = make_results(tmp_path / "r.json", 512, 512)
    report({f"m{i}": results for i in range(count)}, tmp_path / "report")
    assert [ax.get_ylim() for ax in limits] == [(3.0, 0.0)] * count


def test_training_is_drawn_too(tmp_path):
    results = make_results(tmp_path / "r.json", 512, 512)
    records = [{"step": s, "phase": 1 + s // 6, "nll": 4.0 / s, "lr": 0.1,
                "answer_nll": None if s < 3 else 1.0} for s in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = report({"long": results}, tmp_path / "report", training=tmp_path)
    page = Page((out / "index.html").read_text())
    assert page.tags.count("polyline") == 4  # two losses, the rate, and the score's curve
    assert "phase 2" in page.text and "loss, nats a token" in page.text


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file"), ("{", "not valid JSON"),
    ('{"schema": 2}', "is not results of schema 1"),
    ('{"schema": 1, "rows": []}', "is not results of schema 1 with model, rows, summary")])
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        report({"x": tmp_path / "r.json"}, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_no_results_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="at least one result"):
        report({}, tmp_path / "report")


def test_numbers_as_text():
    assert [format_length(n) for n in (0, 512, 1000, 1024, 131072, 1048576, 1536)] == [
        "", "512", "1,000", "1K", "128K", "1M", "1,536"]
    assert format_rate(proportion(49, 50)) == "98 % (49/50; 90-100)"
    assert format_rate(proportion(199, 200)) == "99.5 % (199/200; 97-100)"
    assert format_rate(None) is None and format_loss(None, None) is None
    entry = {"loss": 2.1, "stderr": None}
    assert format_loss(entry, None) == "2.100"
    assert format_loss(entry, {"loss": 2.0}) == "2.100 (+5.00 %)"
    table = [TableRow("s", "a|b", {"x": None, "y": "1"})]
    assert to_markdown(["x", "y"], table).splitlines()[-1] == "| a\\|b |  | 1 |"


def test_a_grid_of_many_lengths_is_one_picture_of_bounded_size(tmp_path):
    """matplotlib makes no picture of 2^16 pixels, and a page of so many squares would not open."""
    lengths = tuple(range(512, 512 + 8 * 2001, 8))
    out = report({"many": make_results(tmp_path / "many.json", 512, 1024, lengths=lengths)},
                 tmp_path / "report")
    width, height = (int.from_bytes((out / "heatmap-passkey.png").read_bytes()[at:at + 4], "big")
                     for at in (16, 20))
    assert width < 6000 and height < 6000
    assert (out / "heatmap-passkey.svg").stat().st_size < 500_000
    text = (out / "index.html").read_text()
    assert text.count('src="data:image/png;base64,') == 1 and "<rect" not in text.partition(
        "length and depth</h2>")[2]
