"""Both stages on directories: what they write, what they leave alone, what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import extend
from extend.cli import main
from extend.errors import CheckpointError, CompatibilityError, DataError, RecipeError
from extend.manifest import MANIFEST_NAME, hash_files
from extend.options import FitOptions, RepairOptions
from extend.tokenizer import load_tokenizer
from extend.transfer.objective import judge
from extend.transfer.setup import make_lesson
from tests.train.tiny import save_examples
from tests.transfer.conftest import random_deltas

QUICK = {"max_new": 8, "length": 192, "rows": 4, "facts": [1], "steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def root(directory, tmp_path_factory) -> Path:
    """base, long (base + delta under a longer RoPE), adapter, target, merged, prompts."""
    root = tmp_path_factory.mktemp("stages")
    shutil.copytree(directory, root / "base")
    for name, seed, scale in (("tuned", 1, 0.1), ("target", 2, 0.05)):
        model = LlamaForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            for key, delta in random_deltas(model, seed=seed, scale=scale).items():
                model.get_parameter(key).add_(delta)
        shutil.copytree(directory, root / name)
        model.to(torch.bfloat16 if name == "target" else torch.float32).save_pretrained(root / name)
    extend.rescale(root / "tuned", root / "long", target_len=256, method="ntk")
    extend.extract(root / "base", root / "long", root / "adapter", rank=8)
    extend.merge(root / "adapter", root / "target", root / "merged")
    save_examples(root, count=12)
    return root


def fit_options(root: Path, **changes) -> FitOptions:
    given = {"target": root / "target", "adapter": root / "adapter",
             "prompts": root / "examples.jsonl", **QUICK, **changes}
    return FitOptions(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()})


def repair_options(root: Path, **changes) -> RepairOptions:
    given = {"merged": root / "merged", "reference": root / "target",
             "prompts": root / "examples.jsonl", **QUICK, **changes}
    return RepairOptions(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()})


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_fit_writes_a_weight_for_every_delta(root, tmp_path):
    out = extend.fit(fit_options(root), tmp_path / "fit")
    weights, results = read(out / "weights.json"), read(out / "fit.json")
    assert weights["schema"] == 1 and weights["default"] == 1.0
    names = {name for name, _ in LlamaForCausalLM.from_pretrained(root / "base").named_parameters()}
    assert set(weights["weights"]) == names
    assert set(weights["weights"].values()) <= {round(w, 6) for w in results["groups"].values()}
    scores = results["scores"]
    assert set(scores) == {"rope", "plain", "fitted"}

    def objective(score):
        return 0.5 * score["kl"] + 0.5 * score["retrieval_loss"]

    assert objective(scores["fitted"]) < objective(scores["plain"])
    assert results["history"]["1"][0]["objective"] == pytest.approx(objective(scores["plain"]))
    manifest = read(out / MANIFEST_NAME)
    assert manifest["stage"] == "fit"
    assert set(manifest["inputs"]) == {"target", "adapter", "prompts"}
    assert manifest["outputs"] == hash_files(out)


def test_a_merge_at_the_weights_is_what_was_judged(root, tmp_path, directory):
    """The directory of a fit is what `layer_weights` takes, so a recipe can name the stage."""
    options = fit_options(root, target=root / "tuned")  # fp32, so nothing is rounded
    out = extend.fit(options, tmp_path / "fit")
    merged = extend.merge(root / "adapter", root / "tuned", tmp_path / "merged", layer_weights=out)
    target, model = (LlamaForCausalLM.from_pretrained(d).eval() for d in (root / "tuned", merged))
    lesson = make_lesson(target, load_tokenizer(root / "tuned"), options, 256)
    assert judge(model, lesson).to_json() == pytest.approx(
        read(out / "fit.json")["scores"]["fitted"], abs=1e-4)


def test_two_models_in_place_of_an_adapter(root, tmp_path):
    out = extend.fit(fit_options(root, adapter=None, tuned=root / "long", base=root / "base"),
                     tmp_path / "fit")
    exact = extend.extract(root / "base", root / "long", tmp_path / "adapter", rank=32)
    other = extend.fit(fit_options(root, adapter=exact), tmp_path / "other")
    found, expected = (read(d / "fit.json")["groups"] for d in (out, other))
    # A full-rank adapter is the delta to some 1e-7; four steps of Adam make little more of it.
    assert found == pytest.approx(expected, abs=1e-3)


def test_texts_of_the_target_stand_in_for_prompts(root, tmp_path):
    out = extend.fit(fit_options(root, prompts=None, sample=6), tmp_path / "fit")
    again = extend.fit(fit_options(root, prompts=None, sample=6), tmp_path / "again")
    assert read(out / "fit.json") == read(again / "fit.json")
    assert "prompts" not in read(out / MANIFEST_NAME)["inputs"]


@pytest.mark.parametrize("rank", [None, 2])
def test_repair_changes_the_layers_alone(root, tmp_path, rank):
    options = repair_options(root, steps=10, lr=2e-3, rank=rank, keep=1.0)
    out = extend.repair(options, tmp_path / "repaired")
    before = load_file(root / "merged" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    changed = {n for n in before if not bool((before[n] == after[n]).all())}
    assert changed and all(".layers." in name for name in changed)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (root / "merged" / file).read_bytes()
    results = read(out / "repair.json")
    assert results["scores"]["repaired"]["kl"] < results["scores"]["merged"]["kl"]
    # Rounded to bfloat16, which the last look was not.
    assert results["scores"]["written"]["kl"] < results["scores"]["merged"]["kl"]
    assert read(out / MANIFEST_NAME)["outputs"] == hash_files(out)
    loaded = LlamaForCausalLM.from_pretrained(out)
    assert loaded.config.max_position_embeddings == 256
    name = "model.layers.0.mlp.up_proj.weight"
    assert_close(loaded.get_parameter(name).data, after[name], atol=0, rtol=0)


def test_no_steps_of_repair_leave_every_byte_of_the_weights(root, tmp_path):
    out = extend.repair(repair_options(root, steps=0), tmp_path / "repaired")
    assert hash_files(out)["model.safetensors"] == hash_files(root / "merged")["model.safetensors"]


def test_a_target_of_other_tokens_is_refused(root, tmp_path):
    for name in ("base", "merged"):
        other = Path(shutil.copytree(root / name, tmp_path / name))
        text = (other / "tokenizer.json").read_text()
        assert '"<|end|>"' in text
        (other / "tokenizer.json").write_text(text.replace('"<|end|>"', '"<|fin|>"'))
        config = (other / "tokenizer_config.json").read_text()
        (other / "tokenizer_config.json").write_text(config.replace("<|end|>", "<|fin|>"))
    with pytest.raises(CompatibilityError, match=r"token '<\|end\|>' is unknown in .*base but "
                                                 r"number 0 in .*target"):
        extend.fit(fit_options(root, adapter=None, tuned=root / "long", base=tmp_path / "base"),
                   tmp_path / "out")
    with pytest.raises(CompatibilityError, match=r"token '<\|end\|>' is unknown in .*merged"):
        extend.repair(repair_options(root, merged=tmp_path / "merged"), tmp_path / "out")


def test_an_adapter_without_a_rope_needs_one(root, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(root / "adapter" / file, plain)
    with pytest.raises(CompatibilityError, match="does not say which RoPE"):
        extend.fit(fit_options(root, adapter=plain), tmp_path / "out")
    out = extend.fit(fit_options(root, adapter=plain, rope_from=root / "long", steps=1),
                     tmp_path / "out")
    assert not any("norm" in name for name in read(out / "weights.json")["weights"])
    with pytest.raises(RecipeError, match="leave rope_from out"):
        extend.fit(fit_options(root, rope_from=root / "long"), tmp_path / "other")


def test_a_delta_of_another_size_is_refused(root, tmp_path):
    other = Path(shutil.copytree(root / "adapter", tmp_path / "other"))
    for file in ("extend_sidecar.json", "extend_sidecar.safetensors"):
        (other / file).unlink()
    tensors = load_file(other / "adapter_model.safetensors")
    key = next(k for k in tensors if "up_proj" in k and "lora_B" in k)
    save_file({**tensors, key: tensors[key][:-1].clone()}, other / "adapter_model.safetensors")
    with pytest.raises(CompatibilityError, match=r"up_proj\.weight \[47, 32\] but the model has "
                                                 r"\[48, 32\]"):
        extend.fit(fit_options(root, adapter=other, rope_from=root / "long"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_two_equal_models_have_no_delta(root, tmp_path):
    same = Path(shutil.copytree(root / "base", tmp_path / "same"))
    with pytest.raises(CompatibilityError, match="every delta is zero"):
        extend.fit(fit_options(root, adapter=None, tuned=same, base=root / "base", length=None,
                               facts=[1], rows=0, keep=1.0), tmp_path / "out")


def test_a_reference_of_another_shape_is_refused(root, tmp_path):
    small = Path(shutil.copytree(root / "target", tmp_path / "small"))
    tensors = load_file(small / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match=r"was not merged from .*tensor model\.norm\.weight"
                                                 r": shape \[32\] in the merged model but \[31\]"):
        extend.repair(repair_options(root, reference=small), tmp_path / "out")


def test_bad_lessons_are_told(root, tmp_path):
    with pytest.raises(RecipeError, match="length is 512, but the long context has 256 tokens"):
        extend.fit(fit_options(root, length=512), tmp_path / "out")
    with pytest.raises(DataError, match="together more than the target's native length of 64"):
        extend.fit(fit_options(root, max_new=60), tmp_path / "out")
    with pytest.raises(DataError, match=r"no room for texts .* 64 tokens"):
        extend.fit(fit_options(root, prompts=None, sample=4, max_new=64), tmp_path / "out")
    (tmp_path / "one.txt").write_text("One.\nOne.\n")
    with pytest.raises(DataError, match="1 prompts: at least two"):  # given twice, it is one
        extend.fit(fit_options(root, prompts=tmp_path / "one.txt"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        extend.repair(repair_options(root), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"adapter": None}, "either an adapter, or both tuned and base"),
    ({"tuned": "x"}, "either an adapter, or both tuned and base"),
    ({"adapter": None, "tuned": "x"}, "tuned is x but there is no base"),
    ({"tuned": "x", "base": "y"}, "either an adapter, or both tuned and base"),
    ({"prompts": None}, "no prompts, and sample is 0"),
    ({"prompts": None, "sample": 1}, "no prompts, and sample is 1"),
    ({"rows": 1}, "rows is 1 and keep 0.5"),
    ({"rows": 0}, "rows is 0 and keep 0.5"),
    ({"keep": 1.5}, "less than or equal to 1"),
    ({"groups": "head"}, "'kind', 'layer' or 'module'"),
    ({"facts": [0]}, "greater than or equal to 1")])
def test_options_that_make_no_sense(root, changes, message):
    with pytest.raises(ValidationError, match=message):
        fit_options(root, **changes)


def test_command_lines(root, tmp_path):
    shared = ["--prompts", str(root / "examples.jsonl"), "--max-new", "8", "--length", "192",
              "--rows", "4", "--facts", "1", "--steps", "2", "--device", "cpu", "--json"]
    runner = CliRunner()
    done = runner.invoke(main, ["fit", "--adapter", str(root / "adapter"), "--target",
                                str(root / "target"), "--out", str(tmp_path / "fit"), *shared])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "fit"), "scores": read(tmp_path / "fit" / "fit.json")["scores"]}
    assert (tmp_path / "fit" / "weights.json").is_file()
    done = runner.invoke(main, ["repair", str(root / "merged"), "--reference", str(root / "target"),
                                "--rank", "2", "--out", str(tmp_path / "repaired"), *shared])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "repaired" / "repair.json").is_file()
    done = runner.invoke(main, ["fit", "--target", str(root / "target"), "--out",
                                str(tmp_path / "no"), *shared])
    assert done.exit_code == 1
    assert "fit: give either an adapter, or both tuned and base" in done.output


def test_a_recipe_fits_and_repairs(root, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    shared = ("prompts: examples.jsonl, max_new: 8, length: 192, rows: 4, facts: [1], steps: 2, "
              "device: cpu")
    recipe.write_text(f"""\
name: learned
seed: 3
stages:
  - {{name: weights, stage: fit, adapter: adapter, target: target, {shared}}}
  - {{name: merged-now, stage: merge, adapter: adapter, target: target, layer_weights: weights}}
  - {{name: repaired, stage: repair, merged: merged-now, reference: target, {shared}}}
""")
    for name in ("adapter", "target", "examples.jsonl"):
        (tmp_path / name).symlink_to(root / name)
    out = extend.run(recipe, tmp_path / "out")
    assert read(out / "weights" / MANIFEST_NAME)["seed"] == 3
    assert read(out / "repaired" / MANIFEST_NAME)["stage"] == "repair"
    first = (out / "repaired" / MANIFEST_NAME).read_bytes()
    extend.run(recipe, tmp_path / "out")
    assert (out / "repaired" / MANIFEST_NAME).read_bytes() == first
