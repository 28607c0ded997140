import json

import pytest

from extend.errors import CheckpointError, RecipeError
from extend.evaluate import report
from extend.evaluate.comparison import TableRow, format_loss, to_markdown
from extend.evaluate.curve import read_curve
from extend.evaluate.score import proportion
from extend.evaluate.summary import summarize
from extend.results import format_length, format_rate
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
        "heatmap-passkey.png", "index.html", "manifest.json", "report.json", "table.md"]
    assert (out / "heatmap-passkey.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text().splitlines() == [
        "| measure | base | long |", "| --- | --- | --- |",
        "| passkey at 512 | 100 % (15/15; 80-100) | 100 % (15/15; 80-100) |",
        "| passkey at 1K | 20 % (3/15; 7-45) | 100 % (15/15; 80-100) |",
        "| effective length, passkey | 512 | 1K |",
        "| passkey, no-needle | 0 % (0/5; 0-43) | 0 % (0/5; 0-43) |",
        "| skill | 90 % (9/10; 60-98) | 90 % (9/10; 60-98) |",
        "| prose, nats a token at 2K | 2.000 +/- 0.010 | 2.020 +/- 0.010 (+1.00 %) |"]
    page = Page((out / "index.html").read_text())
    assert page.tags.count("svg") == 2 and page.tags.count("rect") == 12
    text = " ".join("".join(page.text).split())
    assert "A title" in text and "n = 5 a cell" in text and "+1.00 %" in text
    assert "1,024 tokens, depth 0.50: 1 of 5" in text
    data = json.loads((out / "report.json").read_text())
    assert data["heatmaps"] == {"passkey": "heatmap-passkey.png"}
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
    assert [p.name for p in out.glob("*.png")] == [
        "heatmap-script-alert-x-script-x_1-a.png"]


def test_models_may_have_been_asked_different_things(tmp_path):
    one = make_results(tmp_path / "1.json", 512, 512, lengths=(512,))
    two = make_results(tmp_path / "2.json", 512, 512, lengths=(512, 2048, 300))
    three = make_results(tmp_path / "3.json", 512, 100, task="other")
    out = report({"one": one, "two": two, "three": three}, tmp_path / "report")
    lines = (out / "table.md").read_text().splitlines()
    assert "| passkey at 300 |  | 100 % (15/15; 80-100) |  |" in lines
    assert "| effective length, other |  |  | none |" in lines
    page = Page((out / "index.html").read_text())
    assert page.tags.count("svg") == 3  # two panels of passkey, one of other
    assert "300 tokens, depth 0.50: not measured" in "".join(page.text)


@pytest.mark.parametrize("count", [1, 2, 5])
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


def test_training_curve(tmp_path):
    results = make_results(tmp_path / "r.json", 512, 512)
    records = [{"step": s, "phase": 1 + s // 6, "nll": 4.0 / s,
                "answer_nll": None if s < 3 else 1.0} for s in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = report({"long": results}, tmp_path / "report", training=tmp_path)
    page = Page((out / "index.html").read_text())
    assert page.tags.count("polyline") == 2 and "phase 2" in page.text
    curve = read_curve(tmp_path)
    points = [tuple(map(float, p.split(","))) for p in curve.lines[0][2].split()]
    assert len(points) == 10 and points[0] == (curve.left, curve.top)  # 4.0 is the axis's top
    assert points[-1][0] == curve.right and points[-1][1] < curve.bottom
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="holds no training metrics"):
        read_curve(tmp_path)


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
