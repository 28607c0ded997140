"""Several deltas at once, raw deltas, zero deltas: against sums taken here in fp64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extend.adapter import extract
from extend.errors import CompatibilityError, RecipeError
from extend.merge import merge, preview
from tests.adapter.test_families import FAMILIES
from tests.adapter_format import tiny_models
from tests.adapter_format.tiny_models import LONG, LONG_THETA, SIZES, build, edit_json, move, save
from tests.merge.test_apply import ULP, foreign_adapter, modules_of, weights


@pytest.fixture(scope="module")
def skill(llama, tmp_path_factory) -> Path:
    """A fine-tune of the Llama base with the base's RoPE, and an adapter of it."""
    root = tmp_path_factory.mktemp("skill")
    model = build("llama")
    move(model, seed=7, scale=0.01)
    save(model, root / "tuned", torch.float32)
    extract(llama.models.base, root / "tuned", root / "adapter", rank=4)
    return root


def deltas_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Every delta of one of our adapters in fp64, straight from its files."""
    side = load_file(adapter / "extend_sidecar.safetensors")
    return {**modules_of(adapter), **{name: delta.double() for name, delta in side.items()}}


def added(target: Path, *weighted: tuple[float, dict[str, torch.Tensor]]) -> dict:
    """target + the sum of weight * delta in fp64, rounded to the target's dtypes."""
    total = {}
    for name, value in weights(target).items():
        wide = value.double()
        for weight, deltas in weighted:
            wide = wide + weight * deltas.get(name, torch.zeros(()).double())
        total[name] = wide.to(value.dtype)
    return total


def assert_merged(out: Path, expected: dict[str, torch.Tensor]) -> None:
    merged = weights(out)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        # One rounding of the result, and fp32 noise of the products, whose size is below 1.
        torch.testing.assert_close(merged[name], value, rtol=ULP[value.dtype], atol=3e-7)


def test_several_adapters_are_one_sum(llama, skill, tmp_path):
    out = merge([llama.adapter, skill / "adapter"], llama.models.target, tmp_path / "out",
                weight=[0.75, -0.5])
    assert_merged(out, added(llama.models.target, (0.75, deltas_of(llama.adapter)),
                             (-0.5, deltas_of(skill / "adapter"))))


def test_several_adapters_are_rounded_once(tied, tmp_path):
    """In bf16, one after another would round twice; the sum of both does it once."""
    other = tied.full
    out = merge([tied.adapter, other], tied.models.target, tmp_path / "out", weight=0.5)
    expected = added(tied.models.target, (0.5, deltas_of(tied.adapter)), (0.5, deltas_of(other)))
    merged = weights(out)
    same = torch.cat([(merged[n] == v).flatten() for n, v in expected.items()]).float().mean()
    assert same > 0.999  # the rest are ties that fp32 noise decides the other way
    first = merge(tied.adapter, tied.models.target, tmp_path / "first", weight=0.5)
    shutil.copyfile(tied.models.target / "config.json", first / "config.json")
    twice = weights(merge(other, first, tmp_path / "twice", weight=0.5))
    assert torch.cat([(twice[n] == v).flatten() for n, v in expected.items()]).float().mean() < 0.95


def test_a_raw_delta_is_tuned_minus_base(case, tmp_path):
    models = case.models
    out = merge(None, models.target, tmp_path / "out", tuned=models.tuned, base=models.base,
                weight=0.5)
    base, tuned = weights(models.base), weights(models.tuned)
    deltas = {name: tuned[name].double() - base[name].double() for name in base}
    assert_merged(out, added(models.target, (0.5, deltas)))
    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (LONG_THETA, LONG)
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert (results["modules"], results["raw_tensors"]) == (0, len(base))


def test_a_raw_delta_gives_the_tuned_model_back_bit_for_bit(case, tmp_path):
    """base + (tuned - base): the difference of two bf16 numbers is exact in fp32, that of two
    fp32 numbers is rounded once."""
    out = merge(None, case.models.base, tmp_path / "out", tuned=case.models.tuned,
                base=case.models.base)
    tuned = weights(case.models.tuned)
    for name, value in weights(out).items():
        if case.dtype == torch.bfloat16:
            assert torch.equal(value, tuned[name])
        torch.testing.assert_close(value, tuned[name], rtol=ULP[torch.float32], atol=1e-8)


def test_adapter_and_raw_delta_with_a_weight_each(llama, skill, tmp_path):
    models = llama.models
    out = merge(skill / "adapter", models.target, tmp_path / "out", tuned=models.tuned,
                base=models.base, weight=[2.0, 0.25])
    base, tuned = weights(models.base), weights(models.tuned)
    raw = {name: tuned[name].double() - base[name].double() for name in base}
    assert_merged(out, added(models.target, (2.0, deltas_of(skill / "adapter")), (0.25, raw)))


def test_a_zero_delta_leaves_every_bit(llama, tmp_path):
    """Also negative zeros, to which +0 would be added."""
    target = Path(shutil.copytree(llama.models.target, tmp_path / "target"))
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = -0.0
    tensors["model.norm.weight"][:5] = -0.0
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    long = Path(shutil.copytree(llama.models.base, tmp_path / "long"))
    edit_json(long / "config.json", rope_theta=LONG_THETA, rope_parameters={
        "rope_type": "default", "rope_theta": LONG_THETA}, max_position_embeddings=LONG)
    for number, options in enumerate([{"tuned": long, "base": llama.models.base},
                                      {"adapter": llama.adapter, "weight": 0.0},
                                      {"adapter": llama.adapter, "layer_weights": 0}]):
        adapter = options.pop("adapter", None)
        out = weights(merge(adapter, target, tmp_path / f"out{number}", **options))
        for name, value in weights(target).items():
            assert torch.equal(out[name].view(torch.int32), value.view(torch.int32)), name


def test_fp64_targets_keep_their_precision(llama, tmp_path):
    target = Path(shutil.copytree(llama.models.target, tmp_path / "target"))
    tensors = {n: t.double() * (1 + 1e-12) for n, t in load_file(
        target / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    out = weights(merge(llama.adapter, target, tmp_path / "out"))
    deltas = deltas_of(llama.adapter)
    for name, value in tensors.items():
        expected = value + deltas.get(name, torch.zeros(()).double())
        torch.testing.assert_close(out[name], expected, rtol=0, atol=2e-8)
    assert set(out) == set(tensors)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in tiny_models.FAMILIES])
def test_families(family, tmp_path):
    """A raw delta and an adapter of full rank give the tuned model; half of it the mean."""
    config_class, model_class, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **changes}))
    model.save_pretrained(tmp_path / "base")
    move(model, seed=2, scale=0.01)
    model.save_pretrained(tmp_path / "tuned")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    middle = {n: (weights(base)[n].double() + t.double()).div(2).float()
              for n, t in weights(tuned).items()}
    assert_merged(merge(None, base, tmp_path / "half", tuned=tuned, base=base, weight=0.5), middle)
    extract(base, tuned, tmp_path / "adapter", rank=64)
    out = weights(merge(tmp_path / "adapter", base, tmp_path / "out", weight=0.5))
    for name, value in middle.items():
        # Factors whose singular values are at most about 1 lose some 1e-6 in fp32.
        torch.testing.assert_close(out[name], value, rtol=0, atol=3e-6)


# ---- RoPE ----------------------------------------------------------------------------------------

def test_deltas_that_disagree_on_the_rope_are_refused(llama, tmp_path):
    other = Path(shutil.copytree(llama.models.tuned, tmp_path / "other"))
    edit_json(other / "config.json", rope_theta=5e5, rope_parameters={
        "rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(CompatibilityError, match=r"rope_\w+ is .*250000.0.* after .*adapter but "
                                                 r".*500000.0.* after .*other"):
        merge(llama.adapter, llama.models.target, tmp_path / "out", tuned=other,
              base=llama.models.base)
    assert not (tmp_path / "out").exists()


def test_a_skill_adapter_of_another_program_goes_with_one_that_knows_the_rope(llama, tmp_path):
    skill = foreign_adapter(llama.models.base, tmp_path / "skill", r=4, lora_alpha=8,
                            target_modules=["q_proj"])
    out = merge([skill, llama.adapter], llama.models.target, tmp_path / "out")
    scaled = {name: 2 * product for name, product in modules_of(skill).items()}
    assert_merged(out, added(llama.models.target, (1.0, scaled),
                             (1.0, deltas_of(llama.adapter))))
    assert json.loads((out / "config.json").read_text())["rope_theta"] == LONG_THETA


def test_deltas_that_leave_the_rope_keep_it(llama, skill, tmp_path):
    out = merge(skill / "adapter", llama.models.target, tmp_path / "out")
    before = json.loads((llama.models.target / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after["max_position_embeddings"] == before["max_position_embeddings"]
    assert after["rope_parameters"]["rope_theta"] == before["rope_parameters"]["rope_theta"]


# ---- options -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "message"), [
    ({"adapter": None}, "nothing to merge"),
    ({"weight": [1.0, 2.0]}, "2 weights for 1 deltas"),
    ({"tuned": "tuned"}, "there is no base to subtract"),
    ({"method": "orthogonl", "options": {"rank": 1}}, "did you mean 'orthogonal'"),
    ({"method": "orthogonal"}, "give one of the two"),
    ({"method": "orthogonal", "options": {"rnk": 1}}, "did you mean 'rank'"),
    ({"method": "drift-aware"}, "give --base"),
    ({"layer_weights": {"layers.9.": 1.0}}, "fit none of the"),
    ({"device": "tpu"}, "device: unknown 'tpu'")])
def test_wrong_options(llama, tmp_path, options, message):
    options = dict(options)
    if options.get("tuned"):
        options["tuned"] = llama.models.tuned
    adapter = options.pop("adapter", llama.adapter)
    with pytest.raises(RecipeError, match=message):
        merge(adapter, llama.models.target, tmp_path / "out", **options)
    if "device" not in options:
        found = preview(adapter, llama.models.target, tmp_path / "out", **options)
        assert any(message.split("'")[0] in line for line in found.problems)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_what_stands_against_each_delta(llama, tied, tmp_path):
    found = preview([llama.adapter, tied.adapter], llama.models.target, tmp_path / "out",
                    weight=[1.0, float("nan")], method="drift-aware",
                    base=tied.models.base, layer_weights={"(": 1.0})
    text = "\n".join(found.problems)
    for part in ("weight is nan", "'(' is no regular expression",
                 f"{tied.adapter} on {llama.models.target}: architecture is Qwen2",
                 f"the base {tied.models.base} on {llama.models.target}: architecture is Qwen2"):
        assert part in text
