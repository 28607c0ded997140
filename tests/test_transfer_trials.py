"""scripts/transfer_trials.py: what is done to a delta, in which order, and what is reported."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import extend
from extend.delta.noise import rounding_noise
from extend.merge.methods import METHODS
from extend.model_config import RopeSpec, read_config
from extend.rope.frequencies import attention_factor, inv_freq, turns

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as when the script itself is run

import make_skills
import transfer_trials
from safety_trials import siblings
from transfer_lab import deltas, learned, plan, prepare, recipes, report, units
from transfer_lab.bench import Bench, read_factors, write_factors
from transfer_lab.claims import Clock, claim, drop_claims
from transfer_lab.recipes import GROUPS, mix_rope

BASE = Path(__file__).parents[1] / "assets/demo/base"
CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def subject():
    return siblings.Subject(read_config(BASE), str(BASE), CPU)


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SHAPES = {Q: (40, 24), UP: (24, 64), NORM: (24,)}


# ---- deltas --------------------------------------------------------------------------------------

def test_cuts_are_those_of_the_full_svd():
    delta = draw(SHAPES)
    factors = deltas.factorize(delta, 16)
    lost = total = 0.0
    for name, found in deltas.cut(factors, 5).items():
        u, s, vt = torch.linalg.svd(delta[name].double(), full_matrices=False)
        torch.testing.assert_close(found, (u[:, :5] * s[:5] @ vt[:5]).float(), rtol=0, atol=1e-5)
        lost, total = lost + float(s[5:].square().sum()), total + float(s.square().sum())
    size = deltas.size_of(factors, 5)
    assert size["residual"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert size["adapter_bytes"] == 2 * 5 * (40 + 24 + 24 + 64)
    assert set(factors) == {Q, UP}


def test_factors_come_back_from_disk(tmp_path):
    factors = deltas.factorize(draw(SHAPES), 4)
    write_factors(tmp_path / "f" / "long.safetensors", factors)
    found = read_factors(tmp_path / "f" / "long.safetensors", CPU)
    assert found.keys() == factors.keys()
    for name, f in factors.items():
        torch.testing.assert_close(found[name][:3], f[:3], rtol=0, atol=0)
        assert found[name].total == f.total


def test_the_noise_rule_keeps_what_stands_out_of_bfloat16():
    # All of one size, because that is what the edge is exact for.
    base = {Q: (1.5 + 0.1 * draw(SHAPES)[Q].clamp(-2, 2)).bfloat16().float()}
    edge = rounding_noise(base[Q], base[Q], "BF16").edge
    left, right = (torch.linalg.qr(torch.randn(n, 2, generator=torch.Generator().manual_seed(n))).Q
                   for n in (40, 24))
    strong = {Q: (left * torch.tensor([50 * edge, 20 * edge])) @ right.T}
    assert len(deltas.factorize_above_noise(base, strong, 16)[Q].values) == 2


def test_random_deltas_keep_norms_and_shuffled_ones_keep_spectra():
    delta = draw(SHAPES)
    noise, moved = deltas.random_like(delta, 1), deltas.shuffled(delta, 1)
    for name, d in delta.items():
        assert float(noise[name].norm()) == pytest.approx(float(d.norm()), rel=1e-5)
        torch.testing.assert_close(moved[name].abs().flatten().sort().values,
                                   d.abs().flatten().sort().values, rtol=0, atol=0)
        if d.ndim == 2:
            torch.testing.assert_close(torch.linalg.svdvals(moved[name]), torch.linalg.svdvals(d),
                                       rtol=1e-5, atol=1e-5)
        assert (moved[name] != d).any() and (noise[name] != d).any()
        assert abs(float((moved[name] * d).sum() / d.norm() ** 2)) < 0.5


def test_folded_norms_compute_what_the_norms_did(subject):
    generator = torch.Generator().manual_seed(0)
    delta = {name: 0.1 * w.abs().mean() * torch.randn(w.shape, generator=generator)
             for name, w in subject.base.items() if ".layers." in name}
    ids = torch.randint(0, 600, (2, 40), generator=generator)

    def logits(change):
        subject.become((1.0, change))
        with torch.inference_mode():
            return subject.model(ids).logits.clone()

    wanted, folded = logits(delta), deltas.fold_norms(subject.base, delta)
    assert all(d.ndim == 2 for d in folded.values())
    # fp32 through four layers; without the fold the logits differ by more than 0.1.
    torch.testing.assert_close(logits(folded), wanted, rtol=1e-3, atol=1e-3)
    assert (logits(deltas.matrices(delta)) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_subspaces_are_removed_as_merge_does_it(side):
    base, own, long = (draw(SHAPES, seed) for seed in (1, 2, 3))
    found = deltas.Subspaces(deltas.factorize(own, 8)).remove_from(long, 3, side)
    method = METHODS["orthogonal"](rank=3, side=side)
    for name, d in long.items():
        wanted = method.adjust(name, d.clone(), base[name] + own[name], base[name])
        # Two decompositions in fp32, of values up to 5.
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-4)


def test_overlap_is_1_with_itself_and_that_of_principal_angles_with_another():
    a, b = (deltas.Subspaces(deltas.factorize(draw(SHAPES, seed), 8)) for seed in (1, 2))
    same = a.overlap(a, 4)
    assert (same["overlap_left"], same["overlap_right"]) == pytest.approx((1, 1), rel=1e-5)
    cosines = [torch.linalg.svdvals(a.left[n][:, :4].T @ b.left[n][:, :4]) for n in a.left]
    assert a.overlap(b, 4)["overlap_left"] == pytest.approx(
        sum(float(c.square().mean()) for c in cosines) / 2, rel=1e-5)
    assert same["chance_left"] == pytest.approx((4 / 40 + 4 / 24) / 2)


def test_cosine_is_that_of_the_flat_matrices():
    a, b = draw(SHAPES, 1), draw(SHAPES, 2)
    flat = [torch.cat([d[Q].flatten(), d[UP].flatten()]) for d in (a, b)]
    wanted = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert deltas.cosine(a, b) == pytest.approx(float(wanted), rel=1e-4)


def test_ties_by_hand():
    first = {Q: torch.tensor([[4.0, -3.0, 0.1, 2.0]]), NORM: torch.tensor([1.0, 2.0])}
    second = {Q: torch.tensor([[1.0, 5.0, 0.2, -0.1]])}
    found = deltas.ties([first, second], 0.5)
    # Trimmed: [4, -3, 0, 0] and [1, 5, 0, 0]; the second column elects +.
    torch.testing.assert_close(found[Q], torch.tensor([[5.0, 5.0, 0.0, 0.0]]))
    torch.testing.assert_close(found[NORM], torch.tensor([0.0, 2.0]))


def test_dare_drops_the_share_and_enlarges_the_rest():
    delta = {Q: torch.ones(200, 200)}
    found = deltas.dare(delta, 0.25, 0)[Q]
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.05)


def test_mixed_ropes_make_up_the_whole():
    native = RopeSpec(rope_theta=1e5, rotary_dim=64, original_len=8192)
    changed = replace(native, rope_theta=1.6e7)
    parts = [mix_rope(native, changed, 131072, low, high)
             for low, high in ((32, float("inf")), (4, 32), (0, 4))]
    count = turns(native)
    for part, moved in zip(parts, (count > 32, (count > 4) & (count <= 32), count <= 4),
                           strict=True):
        torch.testing.assert_close(inv_freq(part),
                                   torch.where(moved, inv_freq(changed), inv_freq(native)))
        assert attention_factor(part) == 1 and bool(moved.any())


def test_thirds_hold_every_layer_once():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(30)]
    thirds = [[n for n in names if deltas.in_third(n, k, 30)] for k in range(3)]
    assert [len(third) for third in thirds] == [10, 10, 10]
    assert [*thirds[0], *thirds[1], *thirds[2]] == names
    assert not any(deltas.in_third("model.norm.weight", k, 30) for k in range(3))


# ---- plan ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", plan.LEVELS)
def test_every_unit_is_listed_once_and_can_be_made(level):
    found = list(plan.list_units(plan.LEVELS[level]))
    assert len({unit.file for unit in found}) == len(found)
    longs = {long.name for long in plan.LEVELS[level].longs}
    assert {unit.long for unit in found} == longs | {plan.ALONE}
    assert {unit.group for unit in found} == {*GROUPS, "alone"}
    assert {unit.target for unit in found if unit.group == "main"} == {
        unit.target for unit in found}
    # A target's row alone is what its other rows are compared with.
    first = {unit.target: i for i, unit in reversed(list(enumerate(found)))}
    assert all(found[i].group == "alone" for i in first.values())


def test_a_job_is_claimed_once_in_a_run(tmp_path):
    assert claim(tmp_path, "a") and claim(tmp_path, "b")
    assert not claim(tmp_path, "a")
    drop_claims(tmp_path)
    assert claim(tmp_path, "a")


def test_a_clock_learns_how_slow_the_machine_is(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    clock = Clock(1010.0)
    assert clock.has(9) and not clock.has(11) and Clock(None).has(1e9)
    for _ in range(50):
        clock.learn(2.0, 6.0)
    assert clock.slowness == pytest.approx(3, rel=1e-3)
    assert clock.has(3) and not clock.has(4)


# ---- the whole -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run whose one trained long model stands beside long models with random deltas."""
    root = tmp_path_factory.mktemp("transfer")
    make_skills.main(["--level", "tiny", "--out", str(root / "skills"), "--train", "120",
                      "--test", "6"])
    out = root / "out"
    level = plan.LEVELS["tiny"]
    for spec, method in zip(level.longs[:3], ("ntk-by-parts", "critical", "ntk"), strict=True):
        folder = out / "long" / spec.name.replace(" ", "-")
        extend.rescale(BASE, folder, target_len=1024, method=method)
        stored = load_file(folder / "model.safetensors")
        noise = {n: w if "embed" in n else w + 0.02 * w.std() * torch.randn(w.shape)
                 for n, w in stored.items()}
        save_file(noise, folder / "model.safetensors", {"format": "pt"})
    small = replace(level, skills=("record",), steps=(8,), studied=8, step_tokens=64,
                    text=root / "skills/tiny/text.txt", windows=2, window=64, limit=6, depths=1,
                    length=270, far=(300,), prompts=4, max_new=6, keep_length=270)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.LEVELS, "tiny", small)
        patch.setattr(prepare, "PROSE_PAGES", 60)
        patch.setattr(learned, "KEEP_ROWS", 2)
        for kind in (learned.FIT, learned.REPAIR):
            patch.setitem(kind, "tiny", replace(kind["tiny"], steps=1))
        arguments = ["--level", "tiny", "--out", str(out), "--skills-dir", str(root / "skills"),
                     "--long-steps", "1", "--commit", "abc"]
        only = ["--groups", "alone", "--budget", "600"]
        with patch.context() as quiet:
            quiet.setattr(report.plots, "draw", lambda rows, out: [])  # the next call draws more
            assert transfer_trials.main([*arguments, *only]) == 0
        stopped = json.loads((out / "results.json").read_text())
        assert transfer_trials.main(arguments) == 0
        files = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.json")}
        patch.setattr(report.plots, "draw", lambda rows, out: [])  # of the same rows, in seconds
        assert transfer_trials.main(arguments) == 0
        again = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.json")}
        yield out, json.loads((out / "results.json").read_text()), stopped, (files, again)


def test_a_run_goes_on_where_it_was_stopped(run):
    _, found, stopped, (files, again) = run
    assert {row["group"] for row in stopped["rows"]} == {"alone"}
    assert files == again
    assert [row for row in found["rows"] if row["group"] == "alone"] == stopped["rows"]


@pytest.fixture()
def bare(run, tmp_path):
    """The same targets, no long models and no rows."""
    out, *_ = run
    for name in ("targets", "prose.txt"):
        (tmp_path / name).symlink_to(out / name)
    return Bench("tiny", plan.LEVELS["tiny"], tmp_path, out.parent / "skills", 0, "abc", CPU)


def test_no_time_means_no_row(bare):
    units.run_units(bare, Clock(0.0), None)
    assert not list(bare.out.glob("units/*.json"))


def test_units_that_lack_a_model_or_fail_are_named_and_the_others_done(bare, monkeypatch, capsys):
    def fail(target):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(bare, "put_native", fail)
    with pytest.raises(SystemExit, match=r"alone, base.*error above.*critical-x4 not trained"):
        units.run_units(bare, Clock(None), {"alone", "main"})
    assert capsys.readouterr().err.count("ValueError: broken on purpose") == 2


def test_a_delta_of_weight_0_is_the_rope_alone(run):
    out, found, *_ = run
    bench = Bench("tiny", plan.LEVELS["tiny"], out, out.parent / "skills", 0, "abc", CPU)
    rows = {(r["target"], r["merge"]): r for r in found["rows"]
            if r["group"] == "main" and r["long"] == "critical x4"}
    for target in (plan.Target("record", 8), plan.Target()):
        case = bench.enter(target, "critical x4")
        with bench.merged(case, recipes.whole(case, 0.0)):
            measured = case.measure((270,))
        stored = rows[target.name, "RoPE alone"]
        assert {key: measured[key] for key in ("skill", "text", "passkey")} == {
            key: stored[key] for key in ("skill", "text", "passkey")}
        assert rows[target.name, "whole"]["text"] != stored["text"]


def test_the_largest_rank_is_the_whole_delta(run):
    _, found, *_ = run
    rows = {(r["target"], r["long"], r["merge"]): r for r in found["rows"]}
    for (target, long, merge), row in rows.items():
        if merge == "rank 128":  # all that matrices of 128 rows have
            whole = rows[target, long, "whole"]
            assert row["numbers"]["residual"] == pytest.approx(0, abs=1e-3)
            assert row["text"]["loss"] == pytest.approx(whole["text"]["loss"], rel=1e-4)
            assert row["text"]["kl"] == pytest.approx(whole["text"]["kl"], rel=1e-3)


def test_targets_alone_have_no_kl_and_merged_ones_have(run):
    _, found, *_ = run
    for row in found["rows"]:
        kls = [row["text"]["kl"], *([row["skill"]["kl"]] if row["skill"] else [])]
        if row["group"] == "alone":
            assert kls == pytest.approx([0] * len(kls), abs=1e-9)
        elif row["merge"] != "native RoPE":
            assert min(kls) > 1e-7


def test_the_trained_delta_is_cut_as_the_names_say(run):
    _, found, *_ = run
    own = {row["merge"]: row for row in found["rows"]
           if row["group"] == "embeddings" and row["target"] == "base"}
    shares = [own[name]["numbers"]["share"] for name in ("without embeddings", "embeddings alone")]
    assert sum(shares) == pytest.approx(1, rel=1e-6) and min(shares) > 0
    assert own["whole"]["text"]["loss"] != own["without embeddings"]["text"]["loss"]


def test_every_row_is_in_the_tables(run):
    out, found, *_ = run
    table = (out / "table.md").read_text()
    assert all(f"| {row['merge']} |" in table for row in found["rows"] if row["group"] != "alone")
    assert all(f"## {title}\n" in table for title in report.TITLES.values())
    assert {path.stem for path in out.glob("*.png")} == {"rank", "drift", "mergers", "ablations"}


def test_prompts_are_given_without_answers(run):
    out, *_ = run
    level = replace(plan.LEVELS["tiny"], prompts=3)
    bench = Bench("tiny", level, out, out.parent / "skills", 0, "abc", CPU)
    case = bench.enter(plan.Target("record", 8), level.longs[0].name)
    lines = (out.parent / "skills/tiny/record/train.jsonl").read_text().splitlines()[:3]
    asked = [json.loads(line)["prompt"] for line in lines]
    found = [bench.tokenizer.decode(ids) for ids in learned.make_prompts(case, "own")]
    assert [text.strip() for text in found] == [text.strip() for text in asked]
    assert {len(ids) for ids in learned.make_prompts(case, "other")} == {learned.TEXT_TOKENS}
    assert [len(row.ids) for row in learned.keep_rows(case)] == [level.keep_length] * 2


def test_steps_without_the_studied_ones_are_refused(tmp_path):
    own = plan.LEVELS["tiny"].studied
    with pytest.raises(SystemExit, match=rf"--studied {own} is none of --steps \(5, 20\)"):
        transfer_trials.main(["--level", "tiny", "--out", str(tmp_path), "--steps", "5,20"])


def test_nothing_to_collect_is_said(tmp_path):
    with pytest.raises(SystemExit, match="holds no units"):
        report.collect(tmp_path)
