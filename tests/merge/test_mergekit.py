"""Merging by mergekit's methods: closed forms, mergekit's own command, and every refusal."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from extend.checkpoint import Checkpoint
from extend.cli import main
from extend.errors import CheckpointError, CompatibilityError, ExtendError, RecipeError
from extend.merge import merge, preview
from extend.merge.mergekit import Mergekit, load_methods
from extend.merge.methods import Method
from extend.model_config import read_config
from extend.recipe import load_recipe
from tests.adapter_format.tiny_models import LONG, LONG_THETA, SIZES, Models, build, move, save

# bf16 has 8 significant bits; the last may fall otherwise when fp32 sums run in another order.
BF16 = {"rtol": 2**-7, "atol": 0}
FP32 = {"rtol": 1e-5, "atol": 1e-7}  # a few fp32 sums of numbers near 0.1, in another order


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x.float() for file in sorted(directory.glob("*.safetensors"))
            for name, x in load_file(file).items()}


def by_mergekit(models: Models, method: str, out: Path, *, adapter=None, stage=merge, **changes):
    """`merge` or `preview` of the three models; a change of None leaves an argument out."""
    options = {"tuned": models.tuned, "base": models.base, **changes}
    return stage(adapter, models.target, out, method=f"mergekit:{method}", **options)


def assert_merged(out: Path, models: Models, form: Callable[..., torch.Tensor], **tolerance):
    """Each tensor of `out` is `form(base, target, tuned)` of the fp32 values."""
    base, target, tuned = (tensors(d) for d in (models.base, models.target, models.tuned))
    expected = {name: form(base[name], target[name], tuned[name]) for name in target}
    torch.testing.assert_close(tensors(out), expected, **tolerance)


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest elements by magnitude, a fraction `density` of them."""
    kept = max(1, int(density * delta.numel()))
    edge = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(delta.abs() >= edge, delta, 0)


def ties(base, target, tuned, *, weight=1.0, densities=(1.0, 1.0)):
    """Trim, elect a sign, average what agrees with it (Yadav et al., arXiv 2306.01708)."""
    weights = torch.tensor([1.0, weight])
    deltas = torch.stack([trim(target - base, densities[0]), trim(tuned - base, densities[1])])
    deltas *= weights.view(-1, *[1] * base.dim())
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = (deltas.sign() == sign).float()
    total = torch.einsum("k,k...->...", weights, agrees)
    return base + (deltas * agrees).sum(0) / torch.where(total == 0, 1.0, total)


def slerp(base, target, tuned, *, t):
    """On the great circle through the two whole tensors, the length interpolated the same way."""
    a, b = target.double().flatten(), tuned.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    if cosine.abs() > 0.9995:
        return ((1 - t) * target + t * tuned)
    angle = torch.acos(cosine)
    mixed = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return mixed.view_as(target).float()


def test_task_arithmetic_adds_the_delta(case, tmp_path):
    """On every family: the sum, and RoPE, length, tokenizer and templates of the right model."""
    models = case.models
    out = by_mergekit(models, "task_arithmetic", tmp_path / "out", weight=0.7)
    assert_merged(out, models, lambda base, target, tuned: target + 0.7 * (tuned - base),
                  **(BF16 if case.dtype == torch.bfloat16 else FP32))
    assert Checkpoint(out).infos == Checkpoint(models.target).infos
    config = read_config(out)
    assert config.rope == read_config(models.tuned).rope
    assert (config.rope.rope_theta, config.max_position_embeddings) == (LONG_THETA, LONG)
    assert (out / "chat_template.jinja").read_text() == "target: {{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == LONG
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == case.dtype
    assert model.config.tie_word_embeddings == case.tied
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "target", "tuned"}
    assert manifest["options"]["method"] == "mergekit:task_arithmetic"
    assert manifest["versions"]["mergekit"][0].isdigit()


def test_task_arithmetic_is_our_own_addition(llama, tmp_path):
    """Through another program's sums, the same numbers."""
    models = llama.models
    ours = merge(llama.adapter, models.target, tmp_path / "ours", weight=0.7)
    theirs = by_mergekit(models, "task_arithmetic", tmp_path / "theirs", adapter=llama.adapter,
                         tuned=None, weight=0.7)
    torch.testing.assert_close(tensors(theirs), tensors(ours), **FP32)


@pytest.mark.parametrize(("method", "changes", "form"), [
    ("linear", {"weight": 3.0}, lambda b, t, long: (t + 3 * long) / 4),
    ("linear", {"options": {"target.weight": 0.5, "long.weight": 2, "normalize": False}},
     lambda b, t, long: 0.5 * t + 2 * long),
    ("ties", {"weight": 0.5}, lambda b, t, long: ties(b, t, long, weight=0.5)),
    ("ties", {"options": {"density": 0.3, "target.density": 0.8}},
     lambda b, t, long: ties(b, t, long, densities=(0.8, 0.3))),
    ("slerp", {"options": {"t": 0.25}}, lambda b, t, long: slerp(b, t, long, t=0.25)),
], ids=["linear", "linear-sum", "ties", "ties-trimmed", "slerp"])
def test_closed_forms(llama, tmp_path, method, changes, form):
    out = by_mergekit(llama.models, method, tmp_path / "out", **changes)
    assert_merged(out, llama.models, form, **FP32)
    assert read_config(out).rope.rope_theta == LONG_THETA


def mergekits_command(directory: Path, configuration: dict) -> Path:
    """What mergekit itself writes, in a process of its own."""
    out, file = directory / "mergekits", directory / "mergekit.yml"
    file.write_text(yaml.safe_dump(configuration))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(file), str(out), "--quiet",
               "--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_equals_mergekits_own_command(llama, tmp_path):
    """Values over the layers and for single tensors too: all are found as mergekit finds them.

    Its config has the short model's RoPE, ours the long one's.
    """
    models, density = llama.models, [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.6}]
    theirs = mergekits_command(tmp_path, {
        "merge_method": "ties", "dtype": "float32", "base_model": str(models.base),
        "parameters": {"density": density, "normalize": False},
        "models": [{"model": str(models.target), "parameters": {"weight": 1.0}},
                   {"model": str(models.tuned), "parameters": {"weight": [0.25, 0.75]}}]})
    ours = by_mergekit(models, "ties", tmp_path / "out", options={
        "density": density, "normalize": False, "long.weight": [0.25, 0.75]})
    torch.testing.assert_close(tensors(ours), tensors(theirs), rtol=0, atol=0)
    assert read_config(theirs).rope == read_config(models.base).rope
    assert read_config(ours).rope == read_config(models.tuned).rope


def test_several_long_models_have_their_own_options(llama, tmp_path):
    """Two adapters of full rank and the long model itself are three times the same delta."""
    out = by_mergekit(llama.models, "linear", tmp_path / "out", adapter=[llama.full, llama.full],
                      weight=[0.5, 0.25, 1.0], options={"normalize": False, "target.weight": -0.75})
    # The factors of the full-rank adapter are fp32 and give the delta to about 1e-6 of its norm.
    assert_merged(out, llama.models, lambda base, target, tuned: 1.75 * tuned - 0.75 * target,
                  rtol=1e-4, atol=1e-6)
    with pytest.raises(RecipeError, match=r"long4\.density names no model of this merge; they are "
                                          "target, long1, long2, long3"):
        by_mergekit(llama.models, "ties", tmp_path / "no", adapter=[llama.full, llama.full],
                    options={"long4.density": 0.5})


def test_layer_weights_scale_the_long_model(llama, tmp_path):
    out = by_mergekit(llama.models, "task_arithmetic", tmp_path / "out", weight=0.5,
                      layer_weights={"layers.1.": 0.0, "default": 1.0})
    base, target, tuned = (tensors(d) for d in (
        llama.models.base, llama.models.target, llama.models.tuned))
    expected = {name: target[name] + (0 if ".layers.1." in name else 0.5) * (
        tuned[name] - base[name]) for name in target}
    torch.testing.assert_close(tensors(out), expected, **FP32)


def test_random_methods_repeat_by_seed(llama, tmp_path):
    """DARE keeps each element with probability `density`; the seed decides which."""
    def dare(name: str, seed: int) -> Path:
        torch.manual_seed(len(name))  # nothing outside may matter
        return by_mergekit(llama.models, "dare_linear", tmp_path / name, options={
            "density": 0.5, "target.density": 1.0, "rescale": False, "seed": seed})
    first, again, other = dare("a", 7), dare("bb", 7), dare("c", 8)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    manifest = json.loads((first / "manifest.json").read_text())
    assert (manifest["seed"], manifest["results"]["device"]) == (
        7, "cuda" if torch.cuda.is_available() else "cpu")
    base, target, tuned = (tensors(d) for d in (
        llama.models.base, llama.models.target, llama.models.tuned))
    added = {d: torch.cat([(x - target[name]).flatten() for name, x in tensors(d).items()])
             for d in (first, other)}
    delta = torch.cat([(tuned[name] - base[name]).flatten() for name in tensors(first)])
    kept = added[first].abs() > 1e-6
    torch.testing.assert_close(added[first][kept], delta[kept], rtol=1e-3, atol=1e-6)
    # Of more than 60000 elements, half: the share has a standard deviation of at most 0.002.
    assert delta.numel() > 60000 and abs(float(kept.float().mean()) - 0.5) < 0.01
    assert float((kept == (added[other].abs() > 1e-6)).float().mean()) < 0.51
    up, gate = ((tensors(first)[name] - target[name]).abs() > 1e-6 for name in (
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"))
    assert float((up == gate).float().mean()) < 0.53  # tensors of one shape draw apart


def test_shards_do_not_decide_what_is_dropped(llama, tmp_path):
    """Nor the threads that write them: each tensor has a generator of its own."""
    sharded = save(AutoModelForCausalLM.from_pretrained(llama.models.target),
                   tmp_path / "sharded", torch.float32, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    models = Models(llama.models.base, llama.models.tuned, sharded)
    state = torch.get_rng_state()
    out, one = (by_mergekit(m, "della", tmp_path / name, dtype="bfloat16", options={"density": 0.4})
                for name, m in (("out", models), ("one", llama.models)))
    assert torch.equal(torch.get_rng_state(), state)
    assert Checkpoint(out).file_of == Checkpoint(sharded).file_of
    assert {info.dtype for info in Checkpoint(out).infos.values()} == {"BF16"}
    torch.testing.assert_close(tensors(out), tensors(one), rtol=0, atol=0)


def test_vocabulary_goes_by_token(llama, tmp_path):
    """A target with an added token keeps that row; mergekit's command would refuse or crop."""
    target = Path(shutil.copytree(llama.models.target, tmp_path / "target"))
    model = AutoModelForCausalLM.from_pretrained(target)
    model.resize_token_embeddings(97, mean_resizing=False)
    model.save_pretrained(target)
    text = json.loads((target / "tokenizer.json").read_text())
    text["model"]["vocab"]["<tool>"] = 96
    (target / "tokenizer.json").write_text(json.dumps(text))
    out = by_mergekit(Models(llama.models.base, llama.models.tuned, target), "task_arithmetic",
                      tmp_path / "out")
    base, mine, tuned = (tensors(d) for d in (llama.models.base, target, llama.models.tuned))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        merged = tensors(out)[name]
        torch.testing.assert_close(merged[:96], mine[name][:96] + tuned[name] - base[name], **FP32)
        assert torch.equal(merged[96], mine[name][96])


def test_experts_are_merged_too(tmp_path):
    """mergekit's command lists experts under other names; here a tensor is a tensor."""
    paths = {}
    for seed, role in enumerate(("base", "tuned", "target")):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
        move(model, seed=seed, scale=0.01 if seed else 0.0)
        paths[role] = save(model, tmp_path / role, torch.float32)
    models = Models(**paths)
    assert any("experts" in name for name in Checkpoint(models.target).infos)
    out = by_mergekit(models, "task_arithmetic", tmp_path / "out")
    assert_merged(out, models, lambda base, target, tuned: target + tuned - base, **FP32)


@pytest.mark.parametrize("name", [
    "dare_ties", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "nuslerp", "multislerp",
    "karcher", "model_stock", "arcee_fusion", "ram", "ramplus_tl"])
def test_every_other_method_gives_what_its_kernel_gives(llama, tmp_path, name):
    """On one tensor, called with the roles that mergekit's documentation names."""
    from mergekit.merge_methods import merge_tensors

    out = by_mergekit(llama.models, name, tmp_path / "out")
    method, tensor = load_methods()[f"mergekit:{name}"], "model.layers.0.mlp.up_proj.weight"
    base, target, tuned = (tensors(d)[tensor] for d in (
        llama.models.base, llama.models.target, llama.models.tuned))
    with_base = {"karcher": None, "arcee_fusion": 0}.get(name, 2)
    inputs = [target, tuned, *([base] if with_base == 2 else [])]
    weights = {"weight": [1.0, 1.0]} if any(
        p.name == "weight" for p in method.spec.parameters) else {}
    expected = merge_tensors(inputs, method, base_index=with_base, parameters=weights)
    torch.testing.assert_close(tensors(out)[tensor], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "changes", "error", "parts"), [
    ("tiez", {}, RecipeError, ["unknown 'mergekit:tiez'", "did you mean 'mergekit:ties'?"]),
    ("passthrough", {}, RecipeError, ["unknown 'mergekit:passthrough'"]),
    ("ties", {"options": {"densty": 0.5}}, RecipeError,
     ["unknown option 'densty'", "did you mean 'density'?", "seed"]),
    ("ties", {"options": {"long2.density": 0.5}}, RecipeError,
     ["long2.density names no model", "target, long"]),
    ("ties", {"options": {"base.density": 0.5}}, RecipeError, ["base.density names no model"]),
    ("ties", {"options": {"target.normalize": True}}, RecipeError, ["of one model (target)"]),
    ("ties", {"options": {"density": 1.5}}, RecipeError, ["density is 1.5", "at most 1"]),
    ("ties", {"options": {"density": "half"}}, RecipeError, ["density is 'half'"]),
    ("ties", {"options": {"lambda": float("inf")}}, RecipeError, ["lambda is inf", "finite"]),
    ("ties", {"options": {"density": [0.5, 0.0]}}, RecipeError, ["density is 0.0"]),
    ("ties", {"options": {"density": []}}, RecipeError, ["density is an empty list"]),
    ("ties", {"options": {"density": [{"filter": "mlp", "valu": 1}]}}, RecipeError,
     ["density holds a mapping with filter, valu", "filter and value"]),
    ("ties", {"options": {"seed": 1.5}}, RecipeError, ["seed is 1.5"]),
    ("ties", {"options": {"weight": 0.5}}, RecipeError, ["--weight", "target.weight"]),
    ("ties", {"options": {"long.weight": 0.5}, "weight": 0.7}, RecipeError,
     ["0.7 by --weight", "0.5 by option"]),
    ("della", {"options": {"density": 0.9}}, RecipeError, ["density is 0.9 and epsilon 0.15"]),
    ("slerp", {}, RecipeError, ["missing option t"]),
    ("slerp", {"options": {"t": 0.5}, "weight": 0.5}, RecipeError,
     ["has no weights, but weight is 0.5", "accepts t"]),
    ("slerp", {"options": {"t": 0.5}, "layer_weights": [0.5]}, RecipeError,
     ["has no weights, but layer_weights are given"]),
    ("ties", {"base": None}, ExtendError, ["--base"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_options_are_checked_before_anything_is_read(llama, tmp_path, monkeypatch, method, changes,
                                                     error, parts):
    def refuse(self, name):
        raise AssertionError(f"{name} was read")
    for reader in ("read", "stored"):
        monkeypatch.setattr(Checkpoint, reader, refuse)
    with pytest.raises(error) as caught:
        by_mergekit(llama.models, method, tmp_path / "out", **changes)
    for part in parts:
        assert part in str(caught.value)
    found = by_mergekit(llama.models, method, tmp_path / "out", stage=preview, **changes)
    assert str(caught.value) in found.problems
    assert not list(tmp_path.iterdir())


def test_number_of_models_is_mergekits_to_judge(llama, tmp_path):
    with pytest.raises(RecipeError, match="slerp of target, long1, long2: .*exactly 2 inputs"):
        by_mergekit(llama.models, "slerp", tmp_path / "out", adapter=llama.adapter,
                    options={"t": 0.5})


def test_adapter_needs_its_base(llama, tmp_path):
    with pytest.raises(RecipeError, match="give --base"):
        by_mergekit(llama.models, "ties", tmp_path / "out", adapter=llama.adapter, tuned=None,
                    base=None)


def test_registry_means_what_is_made_of_it():
    """Spot checks, so that a change of mergekit's meaning is seen."""
    methods = load_methods()
    assert {"mergekit:" + name for name in (
        "task_arithmetic", "ties", "dare_ties", "dare_linear", "della", "della_linear",
        "breadcrumbs", "breadcrumbs_ties", "sce", "linear", "slerp", "nuslerp", "multislerp",
        "karcher", "model_stock", "arcee_fusion", "nearswap")} <= set(methods)
    roles = {name: Mergekit(f"mergekit:{name}", options).base_role for name, options in {
        "slerp": {"t": 0.5}, "nearswap": {"t": 0.5}, "arcee_fusion": {}, "ties": {},
        "nuslerp": {}, "linear": {}, "karcher": {}}.items()}
    assert roles == {"slerp": "target", "nearswap": "target", "arcee_fusion": "target",
                     "ties": "base", "nuslerp": "base", "linear": None, "karcher": None}
    assert issubclass(Mergekit, Method)


def test_missing_mergekit_says_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(RecipeError, match=r"pip install 'mergekit>=0\.1\.5'"):
        by_mergekit(llama.models, "ties", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_failure_of_a_kernel_names_the_tensor(llama, tmp_path):
    """Of a list over the layers only some values are wrong, so that DELLA fails half-way."""
    with pytest.raises(CheckpointError, match=r"tensor \S+: mergekit:della of mergekit failed"):
        by_mergekit(llama.models, "della", tmp_path / "out", options={"density": [0.5, 0.05]})
    with pytest.raises(RecipeError, match="no entry of option t fits it"):
        by_mergekit(llama.models, "slerp", tmp_path / "out",
                    options={"t": [{"filter": "mlp", "value": 0.5}]})
    assert not list(tmp_path.glob("out"))


def test_overflow_is_an_error(llama, tmp_path):
    with pytest.raises(CheckpointError, match="infinite or NaN values once merged as"):
        by_mergekit(llama.models, "task_arithmetic", tmp_path / "out", dtype="float16",
                    options={"lambda": 1e9})
    assert not list(tmp_path.glob("out"))


def test_other_shapes_and_ropes_are_refused(llama, tmp_path):
    wide = save(build("llama", intermediate_size=128), tmp_path / "wide", torch.float32)
    with pytest.raises(CompatibilityError, match=r"\[128, 64\]"):
        by_mergekit(llama.models, "ties", tmp_path / "out", tuned=wide)
    assert not list(tmp_path.glob("*out*"))


def test_preview_announces_what_is_written(llama, tmp_path):
    found = by_mergekit(llama.models, "ties", tmp_path / "out", stage=preview)
    assert found.problems == ()
    assert {info.name: info for info in found.tensors} == Checkpoint(llama.models.target).infos
    assert found.change.max_position_embeddings_after == LONG
    assert found.raw_tensors == len(found.tensors)


def test_command_line(llama, tmp_path):
    """Options of the command line arrive as those of Python do."""
    models, options = llama.models, ["density=0.3", "target.density=0.8", "normalize=false",
                                     "long.weight=[0.25, 0.75]"]
    arguments = ["merge", "--adapter", llama.full, "--base", models.base, "--target",
                 models.target, "--method", "mergekit:ties", "--out", tmp_path / "cli", "--json",
                 *(word for pair in options for word in ("-o", pair))]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    out = by_mergekit(models, "ties", tmp_path / "out", adapter=llama.full, tuned=None, options={
        "density": 0.3, "target.density": 0.8, "normalize": False, "long.weight": [0.25, 0.75]})
    torch.testing.assert_close(tensors(tmp_path / "cli"), tensors(out), rtol=0, atol=0)
    wrong = CliRunner().invoke(main, [*map(str, arguments), "--dry-run", "-o", "densty=1"])
    assert wrong.exit_code == 1
    assert "did you mean 'density'?" in wrong.stderr


def test_recipe_is_checked_before_anything_runs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("""
stages:
  - name: merged
    stage: merge
    adapter: adapter
    base: base
    target: target
    method: mergekit:ties
    options:
      densty: 0.5
""")
    with pytest.raises(RecipeError, match=r"recipe.yaml:8: .*unknown option 'densty'"):
        load_recipe(recipe, check_files=False)
    recipe.write_text(recipe.read_text().replace("densty: 0.5", "long2.density: [0.5, 5e-1]"))
    assert load_recipe(recipe, check_files=False).stages[0].options.method == "mergekit:ties"
