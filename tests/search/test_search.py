"""The whole stage on a tiny model: files, resumption, reproducing what was chosen, bad input."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from extend.cli import main
from extend.errors import CheckpointError, CompatibilityError, DataError, RecipeError
from extend.model_config import RopeSpec, read_config
from extend.rope import rescale
from extend.rope.frequencies import inv_freq
from extend.search import search
from extend.search.front import on_front
from extend.search.lab import AXES
from extend.search.measure import Meter
from extend.search.models import check_sibling, check_tokenizer
from tests.evaluate.conftest import save_model
from tests.search.conftest import TARGET_LEN
from tests.tiny_text import make_tokenizer

BUDGET = 34
SMALL = {"target_len": TARGET_LEN, "budget": BUDGET, "rows": 2, "needles": 2,
         "short_tokens": 1024, "sibling_tokens": 1024}


@pytest.fixture(scope="module")
def done(base_dir: Path, sibling_dir: Path, text_file: Path,
         tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "search"
    search(base_dir, out, text=text_file, siblings=[sibling_dir], **SMALL)
    return out


def read(out: Path) -> dict:
    return json.loads((out / "search.json").read_text())


def without_times(found: dict) -> dict:
    return {**found, "evaluations": [{k: v for k, v in e.items() if k != "seconds"}
                                     for e in found["evaluations"]]}


def test_it_writes_every_evaluation_within_the_budget(done: Path):
    found = read(done)
    lines = [json.loads(line) for line in (done / "evaluations.jsonl").read_text().splitlines()]
    assert found["evaluations_used"] == len(lines) - 1 + len(found["native_needle_loss"]) <= BUDGET
    assert [e["key"] for e in found["evaluations"]] == [
        line["candidate"]["key"] for line in lines[1:]]
    for told, line in zip(found["evaluations"], lines[1:]):
        assert told["needle"] == pytest.approx(np.mean(line["items"]["needle"]))
        assert len(line["items"]["needle"]) == 4
    assert (done / "front.png").stat().st_size > 20_000
    manifest = json.loads((done / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"model", "text", "sibling.sibling"}
    assert manifest["outputs"].keys() >= {"search.json", "front.png", "rope.json", "table.txt"}


def test_the_front_is_that_of_the_table(done: Path):
    found = read(done)
    names = list(found["table"]["search"])
    points = np.array([[found["table"]["search"][n][axis]["mean"] for axis in AXES]
                       for n in names])
    expected = {n for n, member in zip(names, on_front(points)) if member}
    assert {row["name"] for row in found["front"]["all_axes"]} == expected
    assert all(0 <= row["share_of_resamples"] <= 1 for row in found["front"]["all_axes"])
    for row in found["table"]["search"].values():
        assert all(row[axis]["low"] <= row[axis]["mean"] <= row[axis]["high"]
                   for axis in (*AXES, "short_kl"))
    assert found["clusters"]["search"] == {"needle": 2, "short": 4, "siblings": 4, "short_kl": 4}


def test_comparisons_are_differences_of_the_table(done: Path):
    found = read(done)
    for split in ("search", "held-out"):
        table = found["table"][split]
        for name, rows in found["comparison"][split].items():
            own = table[found["chosen"][name]["name"]]
            for method, row in rows.items():
                gaps = [own[axis]["mean"] - table[method][axis]["mean"] for axis in AXES]
                assert [row[axis]["mean"] for axis in AXES] == pytest.approx(gaps, abs=1e-9)
                assert row["matched"] == all(gap <= 1e-3 for gap in gaps[:2])
            verdict = found["verdict"][split][name]
            assert verdict["matched"] == sum(row["matched"] for row in rows.values())


def test_a_chosen_setting_can_be_written_by_rescale(done: Path, base_dir: Path, tmp_path: Path):
    found = read(done)
    for name in ("needle", "compromise", "merge-safe"):
        file = json.loads((done / f"rope-{name}.json").read_text())
        out = rescale(base_dir, tmp_path / name, target_len=file["to"], method=file["method"],
                      **file["options"])
        written = read_config(out)
        assert written.rope.to_json() == file["rope"] == found["chosen"][name]["rope"]
        assert written.max_position_embeddings == TARGET_LEN
    best = json.loads((done / "rope.json").read_text())
    assert best == json.loads((done / "rope-compromise.json").read_text())


def test_the_printed_command_writes_the_chosen_setting(done: Path, base_dir: Path,
                                                       tmp_path: Path):
    chosen = read(done)["chosen"]["needle"]
    result = CliRunner().invoke(main, ["rescale", str(base_dir), "--out", str(tmp_path / "out"),
                                       *shlex.split(chosen["command_options"])])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(inv_freq(read_config(tmp_path / "out").rope),
                               inv_freq(RopeSpec.from_json(chosen["rope"])), rtol=0, atol=0)


def test_an_interrupted_search_goes_on_and_ends_the_same(done: Path, base_dir: Path,
                                                         sibling_dir: Path, text_file: Path,
                                                         tmp_path: Path, monkeypatch):
    needle, calls = Meter.needle, []

    def dying(self, rope, length, split):
        calls.append(length)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return needle(self, rope, length, split)

    monkeypatch.setattr(Meter, "needle", dying)
    call = {"text": text_file, "siblings": [sibling_dir], **SMALL}
    with pytest.raises(KeyboardInterrupt):
        search(base_dir, tmp_path / "out", **call)
    assert not (tmp_path / "out" / "search.json").exists()
    with (tmp_path / "out" / "evaluations.jsonl").open("a") as file:
        file.write('{"candidate": {"key"')  # a line that was being written
    search(base_dir, tmp_path / "out", **call)
    assert without_times(read(tmp_path / "out")) == without_times(read(done))
    assert len(calls) == 20 + 1 + read(done)["evaluations_used"] - 19


@pytest.mark.parametrize(("change", "told"), [
    ({"seed": 5}, r"seed was 0 and is 5"), ({"rows": 4}, r"rows was 2 and is 4"),
    ({"siblings": []}, r"sibling.sibling was '\w+' and is None; drift was None and is 0.005")])
def test_evaluations_of_another_search_are_refused(done: Path, base_dir: Path, sibling_dir: Path,
                                                   text_file: Path, change: dict, told: str):
    before = (done / "evaluations.jsonl").read_bytes()
    call = {"text": text_file, "siblings": [sibling_dir], **SMALL, **change}
    with pytest.raises(CheckpointError, match=told):
        search(base_dir, done, **call)
    assert (done / "evaluations.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["torch", "transformers", "extend", "device"])
def test_evaluations_of_other_versions_are_refused(done: Path, base_dir: Path, sibling_dir: Path,
                                                   text_file: Path, tmp_path: Path, name: str):
    out = shutil.copytree(done, tmp_path / "out")
    first, *others = (out / "evaluations.jsonl").read_text().splitlines()
    fingerprint = json.loads(first)["fingerprint"]
    was, fingerprint[name] = fingerprint[name], "other"
    (out / "evaluations.jsonl").write_text("\n".join(
        [json.dumps({"fingerprint": fingerprint}), *others]) + "\n")
    with pytest.raises(CheckpointError, match=rf"{name} was 'other' and is '{re.escape(was)}'"):
        search(base_dir, out, text=text_file, siblings=[sibling_dir], **SMALL)


def test_without_siblings_two_are_made(base_dir: Path, text_file: Path, tmp_path: Path):
    search(base_dir, tmp_path / "out", text=text_file, merge_safe=True, reach=50.0, **SMALL)
    found = read(tmp_path / "out")
    row = found["table"]["search"]["ntk"]
    assert set(row["by_sibling"]) == {"delta 1", "delta 2"}
    assert row["siblings"]["mean"] == pytest.approx(np.mean(list(row["by_sibling"].values())))
    # Everything is below 50 nats: the least disturbance of all that engines can read.
    assert found["reached"]["any"] and found["reached"]["limit"] == 50.0
    least = min((r["siblings"]["mean"], n) for n, r in found["table"]["search"].items()
                if n != "unchanged" and not n.startswith("proportional"))
    assert found["chosen"]["merge-safe"]["name"] == least[1]
    assert json.loads((tmp_path / "out" / "rope.json").read_text())["options"] == (
        found["chosen"]["merge-safe"]["options"])


@pytest.mark.parametrize(("change", "error", "told"), [
    ({"target_len": 512}, RecipeError, r"target length 512 is the native length"),
    ({"target_len": 256}, RecipeError, r"target length 256 is below the model's native length 512"),
    ({"budget": 20}, RecipeError, r"budget is 20 but \d+ evaluations are the least"),
    ({"budget": 0}, RecipeError, r"budget must be a whole number of at least 1, not 0"),
    ({"needles": 40}, RecipeError, r"needles must be at most 16, not 40"),
    ({"drift": 0.0}, RecipeError, r"drift must lie between 0 and 1, not 0.0"),
    ({"reach": -1.0}, RecipeError, r"reach must be a loss above 0, not -1.0"),
    ({"sibling_text": ["a", "b"]}, RecipeError, r"2 sibling texts for 0 siblings"),
    ({"text": "nowhere.txt"}, DataError, r"nowhere.txt: unknown kind|no such file"),
    ({"target_len": 65536}, DataError, r"tokens, too few for a passage of")])
def test_bad_input_leaves_nothing_behind(base_dir: Path, text_file: Path, tmp_path: Path,
                                         change: dict, error: type, told: str):
    with pytest.raises(error, match=told):
        search(base_dir, tmp_path / "out", **{"text": text_file, **SMALL, **change})
    assert not (tmp_path / "out").exists()


def test_an_extended_model_and_a_foreign_sibling_are_refused(base_dir: Path, text_file: Path,
                                                             tmp_path: Path):
    longer = rescale(base_dir, tmp_path / "longer", target_len=1024, method="yarn")
    with pytest.raises(CompatibilityError, match=r"512.*1024"):
        search(longer, tmp_path / "out", text=text_file, **{**SMALL, "target_len": 2048})
    with pytest.raises(CompatibilityError, match=r"its RoPE is .*yarn.* but that of"):
        search(base_dir, tmp_path / "out", text=text_file, siblings=[longer], **SMALL)
    other = save_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(CompatibilityError, match=r"hidden_size is 64 but .* has 32"):
        search(base_dir, tmp_path / "out", text=text_file, siblings=[other], **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "told"), [
    ({"partial_rotary_factor": 0.5}, r"its RoPE is .*'rotary_dim': 4.* but that of"),
    ({"rope_theta": 1e6}, r"its RoPE is .*'rope_theta': 1000000.0.* but that of"),
    ({"sliding_window": 64}, r"its sliding window is 64 but that of .* is None")])
def test_a_sibling_with_another_rope_or_window_is_refused(
        base_dir: Path, sibling_dir: Path, text_file: Path, tmp_path: Path, changes: dict,
        told: str):
    sibling = shutil.copytree(sibling_dir, tmp_path / "fine")
    config = json.loads((sibling / "config.json").read_text())
    config["rope_parameters"] |= {k: v for k, v in changes.items() if k != "sliding_window"}
    config |= {k: v for k, v in changes.items() if k == "sliding_window"}
    (sibling / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompatibilityError, match=told):
        search(base_dir, tmp_path / "out", text=text_file, siblings=[sibling], **SMALL)


def test_layers_with_a_rope_of_their_own_must_agree(base_dir: Path):
    base = read_config(base_dir)
    others = [replace(base, rope_by_layer_type={"sliding_attention": replace(
        base.rope, rope_theta=theta)}) for theta in (1e4, 1e5)]
    check_sibling(others[0], others[0])
    with pytest.raises(CompatibilityError, match="its RoPE of other layers is .*100000.0"):
        check_sibling(*others)


def test_a_sibling_that_reads_text_otherwise_is_refused(base_dir: Path, sibling_dir: Path,
                                                        text_file: Path, tmp_path: Path):
    sibling = shutil.copytree(sibling_dir, tmp_path / "fine")
    make_tokenizer("bytes").save_pretrained(sibling)  # without the base's BOS
    with pytest.raises(CompatibilityError, match=r"fine: its tokenizer differs from that of .*"
                                                 r"\(token 0\); give fine-tunes"):
        search(base_dir, tmp_path / "out", text=text_file, siblings=[sibling], **SMALL)
    make_tokenizer("bytes-bos").save_pretrained(sibling)
    check_tokenizer(make_tokenizer("bytes-bos"), base_dir, sibling, text_file.read_text())


def test_a_window_below_the_target_is_refused_or_kept(text_file: Path, tmp_path: Path):
    model = tmp_path / "mistral"
    save_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({
        **config, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "sliding_window": 256}))
    with pytest.raises(CompatibilityError, match=r"sliding window of 256 tokens, below the target "
                                                 r"length 1024; choose sliding_window 'keep'"):
        search(model, tmp_path / "out", text=text_file, **SMALL)
    assert not (tmp_path / "out").exists()
    search(model, tmp_path / "out", text=text_file, sliding_window="keep", **SMALL)
    command = shlex.split(read(tmp_path / "out")["chosen"]["needle"]["command_options"])
    result = CliRunner().invoke(main, ["rescale", str(model), "--out", str(tmp_path / "to"),
                                       *command])
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "to").sliding_window == 256


def test_a_directory_with_something_else_is_left_alone(base_dir: Path, text_file: Path,
                                                       tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something else than a search"):
        search(base_dir, tmp_path, text=text_file, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def everything(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("place", "role"), [
    ("model", "model"), ("model/found", "model"), (".", "model"), ("texts", "text"),
    ("texts/found", "text"), ("more", "sibling.fine"), ("link", "model"),
    ("words", "sibling_text.0")])
def test_nothing_that_is_read_is_replaced(base_dir: Path, sibling_dir: Path, text_file: Path,
                                          tmp_path: Path, place: str, role: str):
    shutil.copytree(base_dir, tmp_path / "model")
    shutil.copytree(sibling_dir, tmp_path / "more" / "fine")
    for name in ("texts", "words"):
        (tmp_path / name).mkdir()
        shutil.copy(text_file, tmp_path / name / "text.txt")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = everything(tmp_path)
    with pytest.raises(RecipeError, match=rf"out .* and {role} .* lie in one another"):
        search(tmp_path / "model", tmp_path / place, text=tmp_path / "texts" / "text.txt"
               if place == "texts" else tmp_path / "texts", siblings=[tmp_path / "more" / "fine"],
               sibling_text=[tmp_path / "words"], overwrite=True, **SMALL)
    assert everything(tmp_path) == before


def test_the_command_prints_the_table_and_how_to_go_on(done: Path, base_dir: Path,
                                                       sibling_dir: Path, text_file: Path):
    arguments = ["search", str(base_dir), "--to", "1k", "--text", str(text_file), "--siblings",
                 str(sibling_dir), "--budget", str(BUDGET), "--rows", "2", "--needles", "2",
                 "--short-tokens", "1024", "--sibling-tokens", "1024", "--out", str(done), "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    table = (done / "table.txt").read_text()
    assert table.strip() in result.output
    assert all(name in table for name in ("linear", "ntk", "critical", "yarn", "<- needle"))
    command = next(line for line in result.output.splitlines() if line.startswith("extend rescale"))
    assert " " in str(base_dir)  # so it has to be quoted
    assert shlex.split(command)[2:5] == [str(base_dir), "--to", "1024"]
    # Random weights guess: about 10 nats a token.
    assert "No setting reaches the target: the least needle loss is" in result.output
    assert "from 2 rows with hidden facts, 4 windows of short text, 4 of a sibling's" in (
        result.output)
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert told["output"] == str(done / "search.json")
    assert set(told["chosen"]) >= {"needle", "compromise", "merge-safe"}
