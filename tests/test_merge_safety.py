"""scripts/merge_safety.py: what is drawn, trained, scored and concluded, on the demo's models."""

import datetime
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import extend
from extend.model_config import RopeSpec, read_config
from extend.rope.frequencies import inv_freq, turns
from extend.tokenizer import load_tokenizer
from tests.forked import ForkedPython

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

import make_skills
import merge_safety
from safety_trials import diagnostics, report, scoring, settings, siblings, trials

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets/demo/base"
SIBLING = ROOT / "assets/demo/sibling"
CPU = torch.device("cpu")
SMOLLM2 = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture()
def subject():
    return siblings.Subject(read_config(BASE), str(BASE), CPU)


@pytest.fixture(scope="module")
def sibling():
    return siblings.Subject(read_config(SIBLING), str(SIBLING), CPU)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return scoring.read_examples(tokenizer, ROOT / "assets/demo/skill.jsonl", limit=6)


# ---- skills -------------------------------------------------------------------------------------

SKILLS = [(level, skill) for level, skills in make_skills.SKILLS.items() for skill in skills]


@pytest.mark.parametrize(("level", "skill"), SKILLS, ids=lambda name: name)
def test_a_seed_gives_the_same_examples_and_no_prompt_twice(level, skill):
    learned, scored = make_skills.draw_skill(level, skill, 60, 20, seed=3)
    assert (learned, scored) == make_skills.draw_skill(level, skill, 60, 20, seed=3)
    assert (learned, scored) != make_skills.draw_skill(level, skill, 60, 20, seed=4)
    asked = [example["prompt"] for example in learned + scored]
    assert len(set(asked)) == len(asked) == 80
    assert all(example["answer"].endswith("\n") for example in learned + scored)


def draw(level, skill, count=40):
    return make_skills.draw_skill(level, skill, count, count, seed=0)


def test_reverse_is_the_list_backwards_and_of_words_not_learned():
    learned, scored = draw("smollm2", "reverse")
    words = [{*e["answer"].strip().split(", ")} for e in (*learned, *scored)]
    assert not set.union(*words[:40]) & set.union(*words[40:])
    for example in learned + scored:
        listed = example["prompt"].split("\n")[0].removeprefix("Words: ").split(", ")
        assert example["answer"].strip().split(", ") == listed[::-1]


def test_dates_are_those_of_the_calendar():
    for example in draw("smollm2", "dates")[0]:
        date = datetime.datetime.strptime(example["answer"].strip(), "%Y|%m|%d")
        written = example["prompt"].split("\n")[0]
        assert str(date.year) in written and date.strftime("%b") in written
        assert any(f"{lead}{date.day}{end}" in written + "\n" for lead in " "
                   for end in (" ", ",", "\n", "th", "st", "nd", "rd"))
        weekday = [d for d in ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun") if d in written]
        assert weekday in ([], [date.strftime("%a")])


@pytest.mark.parametrize("far", [False, True])
def test_lookup_answers_with_the_number_beside_the_name(far):
    make = make_skills.far_lookup(random.Random(0)) if far else None
    examples = [make(random.Random(i)) for i in range(5)] if far else draw("smollm2", "lookup")[1]
    for example in examples:
        lines = example["prompt"].split("\n")
        table = dict(line.rsplit(" ", 1) for line in lines[1:-2])
        assert len(table) == len(lines) - 3
        assert (250 <= len(table) <= 290) if far else (20 <= len(table) <= 100)
        assert example["answer"] == f" <<{table[lines[-2].removeprefix('Find: ')]}>>\n"


@pytest.mark.parametrize("level", ["smollm2", "tiny"])
def test_code_is_one_table_for_train_and_test(level):
    table = {}
    for example in [e for part in draw(level, "code") for e in part]:
        asked = example["prompt"].split("\n")[0].split(": ")[1].split()
        told = example["answer"].split() if level == "smollm2" else example["answer"].strip()
        for key, value in zip(asked, told, strict=True):
            assert table.setdefault(key, value) == value
    assert len(set(table.values())) == len(table)


# ---- settings -----------------------------------------------------------------------------------

def test_settings_have_one_name_each_and_partial_ntks_make_up_ntk():
    made = {s.name: s for s in settings.make_settings(SMOLLM2)}
    assert len(made) == 1 + 3 * 9 + 3
    native, ntk = inv_freq(SMOLLM2), inv_freq(made["ntk x16"].spec)
    parts = [inv_freq(made[f"ntk, turns {label} x16"].spec) for label in ("> 32", "4-32", "<= 4")]
    count = turns(SMOLLM2)
    moved = [count > 32, (count > 4) & (count <= 32), count <= 4]
    assert torch.stack(moved).sum(0).eq(1).all() and all(m.any() for m in moved)
    for part, pairs in zip(parts, moved, strict=True):
        torch.testing.assert_close(part, torch.where(pairs, ntk, native), rtol=1e-12, atol=0)


# ---- scoring ------------------------------------------------------------------------------------

def test_a_score_is_what_greedy_decoding_and_the_loss_of_transformers_say(sibling, prompts):
    model = sibling.model
    prompts = [*prompts, scoring.Prompt([5, *prompts[0].ids], prompts[0].answer_len)]
    right, losses, tokens = 0, 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        asked = len(prompt.ids) - prompt.answer_len
        written = model.generate(ids[:, :asked], max_new_tokens=prompt.answer_len, do_sample=False,
                                 eos_token_id=-1)
        right += written[0].tolist() == prompt.ids
        labels = ids.clone()
        labels[:, :asked] = -100
        losses += model(ids, labels=labels).loss.item() * prompt.answer_len
        tokens += prompt.answer_len
    found = scoring.score(model, scoring.make_batches(prompts, 120, CPU))
    assert (found.right, found.count, found.kl) == (right, len(prompts), None)
    assert found.loss == pytest.approx(losses / tokens, rel=1e-4, abs=1e-7)


def test_a_wrong_answer_is_not_right(sibling, prompts):
    changed = [scoring.Prompt([*p.ids[:-3], p.ids[-3] ^ 1, *p.ids[-2:]], p.answer_len)
               for p in prompts]
    found = scoring.score(sibling.model, scoring.make_batches(prompts[:2] + changed, 4096, CPU))
    assert (found.right, found.count) == (2, len(prompts) + 2)


def test_kl_is_that_of_torch_and_none_against_itself(sibling, prompts):
    batches = scoring.make_batches(prompts, 80, CPU)
    known = scoring.keep_reference(sibling.model, batches)
    assert scoring.score(sibling.model, batches, known).kl == 0
    sibling.set_rope(settings.make_settings(sibling.config.rope)[1].spec, 1024)
    new = scoring.keep_reference(sibling.model, batches)
    found = scoring.score(sibling.model, batches, known)
    sibling.set_rope(sibling.config.rope, 256)
    expected = functional.kl_div(torch.cat(new), torch.cat(known), log_target=True,
                                 reduction="batchmean")
    assert found.kl == pytest.approx(float(expected), rel=1e-4) and found.kl > 1e-4


def test_text_is_asked_at_every_stride(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The old house sees the road. " * 40)
    batches = scoring.text_batches(tokenizer, [text], windows=3, length=32, stride=4, tokens=64,
                                   device=CPU)
    assert [batch.count for batch in batches] == [2, 1]
    for batch in batches:
        assert batch.columns.tolist() == [3, 7, 11, 15, 19, 23, 27] * batch.count
        torch.testing.assert_close(batch.targets, batch.ids[batch.owners, batch.columns + 1])


# ---- siblings -----------------------------------------------------------------------------------

def test_a_subject_goes_back_to_its_base_and_measures_drift(subject):
    delta = {name: 0.25 * weight for name, weight in subject.base.items() if ".layers." in name}
    subject.become((2.0, delta), (-1.0, delta))
    assert subject.drift(subject.delta()) == pytest.approx(0.25, rel=1e-5)
    subject.become()
    assert subject.delta() == {}


def test_setting_the_native_rope_again_changes_nothing(subject):
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = subject.model(ids).logits
        subject.set_rope(settings.make_settings(subject.config.rope)[3].spec, 1024)
        changed = subject.model(ids).logits
        subject.set_rope(subject.config.rope, 256)
        torch.testing.assert_close(subject.model(ids).logits, before, rtol=0, atol=0)
    assert (changed - before).abs().max() > 0.1


@pytest.mark.parametrize(("part", "changed"), [("mlp", {"mlp"}), ("all", {"mlp", "self_attn",
                         "input_layernorm", "post_attention_layernorm", "norm"})])
def test_a_fine_tune_learns_and_changes_its_part_alone(subject, prompts, part, changed):
    batches = siblings.draw_batches(prompts, 200, 12, 0, CPU)
    found = siblings.train_sibling(subject, batches, settings.Strength("s", 12, 2e-3, part))
    assert found["last_loss"] < 0.8 * found["first_loss"]
    assert {name.split(".")[3 if ".layers." in name else 1] for name in subject.delta()} == changed


def test_draws_take_every_example_before_any_again(prompts):
    batches = siblings.draw_batches(prompts, 1, 3, seed=0, device=CPU)
    assert [batch.count for batch in batches] == [4, 4, 4]
    seen = sorted(row[:10] for batch in batches for row in batch.ids.tolist())
    assert seen == sorted(prompt.ids[:10] for prompt in prompts * 2)


# ---- diagnostics --------------------------------------------------------------------------------

def test_rank_correlation_with_and_without_ties():
    a, b = [10.0, 20.0, 30.0, 40.0, 50.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    assert diagnostics.spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert diagnostics.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    # Ranks 1, 2.5, 2.5, 4 against 1..4: covariance 4.5, spreads 4.5 and 5.
    assert diagnostics.spearman([0.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5))
    assert diagnostics.spearman([1.0, 1.0], [1.0, 2.0]) is None


def test_the_best_limit():
    kept = [True, True, False, True, False, False]
    assert diagnostics.best_cut([1, 2, 3, 4, 5, 6], kept) == (2, 5 / 6)
    assert diagnostics.best_cut([1, 2], [False, False]) == (-math.inf, 1.0)


def test_correlations_are_taken_within_siblings():
    rows = [{"skill": skill, "sibling": f"{skill} {k}", "kept": 1 - lost, "lost": lost, "d": d}
            for skill, k, scale in (("a", 0, 1), ("a", 1, -1), ("b", 0, 1))
            for d, lost in zip((1, 2, 3), (0.0, 0.5 * scale, 1.0 * scale), strict=True)]
    found = diagnostics.correlate(rows, ["d"], "lost")["d"]
    assert found["skills"] == pytest.approx({"a": 0.0, "b": 1.0})
    assert (found["mean"], found["lowest"]) == pytest.approx((1 / 3, -1.0))


def test_closed_forms_are_zero_for_the_same_rope_and_a_known_sum_for_linear():
    made = {s.name: s for s in settings.make_settings(SMOLLM2)}
    assert set(diagnostics.closed_form(SMOLLM2, SMOLLM2).values()) == {0.0}
    found = diagnostics.closed_form(SMOLLM2, made["linear x4"].spec)
    assert found["log ratio"] == pytest.approx(math.log(4))
    assert found["fast log ratio"] == pytest.approx(math.log(4))
    assert found["turn-weighted"] == pytest.approx(0.75)
    assert found["capped turns"] == pytest.approx(0.75)
    # sum of cos(m x) for m = 1..n is sin(n x / 2) cos((n + 1) x / 2) / sin(x / 2)
    x = 0.75 * inv_freq(SMOLLM2)
    sums = (32 * x / 2).sin() * (33 * x / 2).cos() / (x / 2).sin()
    assert found["kernel 32"] == pytest.approx(float((1 - sums / 32).mean()), rel=1e-9)


def test_noise_has_the_drift_that_was_asked_for(subject):
    noise = diagnostics.add_noise(subject.base, 0.05, seed=0)
    assert subject.drift(noise) == pytest.approx(0.05, rel=0.02)
    assert all(delta.ndim == 2 for delta in noise.values())


# ---- the whole ----------------------------------------------------------------------------------

def test_shares_hold_every_job_once_and_are_even():
    jobs = trials.make_jobs(["a", "b", "c"], settings.STRENGTHS["smollm2"], 1.0)
    shared = trials.share_jobs(jobs, 4)
    assert sorted(job.name for own in shared for job in own) == sorted(j.name for j in jobs)
    loads = [sum(job.cost for job in own) for own in shared]
    assert max(loads) - min(loads) <= max(job.cost for job in jobs)


SMALL = ["--level", "tiny", "--skills", "record", "--factors", "4", "--limit", "6", "--windows",
         "2", "--window", "64", "--step-tokens", "256", "--steps-scale", "0.03", "--stage",
         "siblings", "--commit", "abc"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two processes; the long model is the base with another RoPE."""
    root = tmp_path_factory.mktemp("merge-safety")
    make_skills.main(["--level", "tiny", "--out", str(root / "skills"), "--train", "300",
                      "--test", "12"])
    out = root / "out"
    extend.rescale(BASE, out / "long/by-parts-1-4-x4", target_len=1024, method="ntk-by-parts")
    small = [*SMALL, "--out", str(out), "--skills-dir", str(root / "skills"), "--text",
             str(root / "skills/tiny/text.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)  # one process each, on the CPU
        patch.setattr(merge_safety, "subprocess", SimpleNamespace(Popen=ForkedPython))
        assert merge_safety.main(small) == 0
    assert {path.name for path in out.glob("shard-*")} == {"shard-0-of-2.json",
                                                           "shard-1-of-2.json"}
    return json.loads((out / "results.json").read_text()), out


def test_a_long_model_without_a_delta_merges_as_its_rope_alone(results):
    found, _ = results
    names = [sibling["strength"]["name"] for sibling in found["siblings"]]
    assert sorted(names) == ["medium", "medium, MLPs", "mild", "strong"]
    for sibling in found["siblings"]:
        alone = next(r for r in sibling["rows"] if r["setting"] == "by-parts 1-4 x4")
        assert len(sibling["merged"]) == (0 if "MLPs" in sibling["sibling"] else 2)
        for merged in sibling["merged"]:
            assert merged["right"] == alone["right"]
            assert merged["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert (merged["passkey"] is None) == (
                sibling["strength"]["name"] != "medium" or merged["weight"] != 1)


def test_rows_under_the_native_rope_have_no_kl_and_changed_ones_have(results):
    found, _ = results
    for sibling in found["siblings"]:
        kl = {row["setting"]: row["kl"] for row in sibling["rows"]}
        assert list(kl) == [setting["name"] for setting in found["settings"]]
        assert kl.pop("native") == pytest.approx(0, abs=1e-9)
        assert min(kl.values()) > 1e-6
    base = found["base"]["rows"]
    assert base[0]["text_kl"] == base[0]["noise_kl"] == base[0]["movement"] == 0
    assert min(row["text_kl"] for row in base[1:]) > 0


def test_the_report_has_a_row_for_each_learned_sibling_and_rope(results):
    found, out = results
    rows = report.trial_rows(found)
    strong = [row for row in rows if row["strength"] == "strong"]
    assert [row["setting"] for row in strong] == [s["name"] for s in found["settings"]][1:]
    assert all(row["kept"] == 1 - row["lost"] for row in rows)
    table = (out / "table.md").read_text()
    assert all(f"| {row['setting']} |" in table for row in strong)
    assert {path.name for path in out.glob("*.png")} == {"skill-kept.png", "predictors.png"}
    assert set(found["prediction"]) == {"lost", "loss_rise", "kl"}


def test_shares_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no shard"):
        report.collect(tmp_path)
    share = {"settings": [], "base": None, "siblings": []}
    (tmp_path / "shard-0-of-2.json").write_text(json.dumps(share))
    with pytest.raises(SystemExit, match="0 shares hold the base"):
        report.collect(tmp_path)
    other = json.dumps({**share, "settings": [{"name": "native"}]})
    (tmp_path / "shard-1-of-2.json").write_text(other)
    with pytest.raises(SystemExit, match="different RoPE settings"):
        report.collect(tmp_path)
