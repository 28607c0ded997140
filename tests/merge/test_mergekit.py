"""Merging by mergekit: closed forms for its methods, and what it must not decide itself.

Every run starts a process that imports torch, so one run serves several assertions.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extend.checkpoint import Checkpoint
from extend.errors import CheckpointError, CompatibilityError, ExtendError, RecipeError
from extend.merge.mergekit import (
    Request,
    check_method,
    load_methods,
    merge_by_mergekit,
    preview_by_mergekit,
    run,
)
from extend.model_config import read_config
from tests.adapter_format.tiny_models import LONG, LONG_THETA, Models, build, edit_json, save

# bf16 has 8 significant bits; the last may fall otherwise when fp32 sums run in another order.
BF16 = {"rtol": 2**-7, "atol": 0}
FP32 = {"rtol": 1e-5, "atol": 1e-7}  # a few fp32 sums of numbers near 0.1, in another order


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x.float() for file in sorted(directory.glob("*.safetensors"))
            for name, x in load_file(file).items()}


def asking(models: Models, method: str, **changes) -> Request:
    return Request(**{"method": f"mergekit:{method}", "target": models.target,
                      "tuned": models.tuned, "base": models.base, **changes})


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


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_task_arithmetic_adds_the_delta(name, tmp_path, request):
    """The sum, and RoPE, length, tokenizer and templates each of the right model."""
    case = request.getfixturevalue(name)
    models = case.models
    out = merge_by_mergekit(asking(models, "task_arithmetic", weights=(0.7,)), tmp_path / "out")
    assert_merged(out, models, lambda base, target, tuned: target + 0.7 * (tuned - base),
                  **(BF16 if case.dtype == torch.bfloat16 else FP32))
    assert Checkpoint(out).infos == Checkpoint(models.target).infos
    config = read_config(out)
    assert config.rope == read_config(models.tuned).rope
    assert (config.rope.rope_theta, config.max_position_embeddings) == (LONG_THETA, LONG)
    assert (out / "chat_template.jinja").read_text() == "target: {{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == LONG
    assert "max_length" not in json.loads((out / "generation_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == case.dtype
    assert model.config.tie_word_embeddings == case.tied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "target", "tuned"}
    assert manifest["options"]["method"] == "mergekit:task_arithmetic"
    assert manifest["options"]["weight"] == [0.7]
    assert set(manifest["outputs"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    assert yaml.safe_load((out / "mergekit_config.yml").read_text())["merge_method"] == \
        "task_arithmetic"


@pytest.mark.parametrize(("method", "changes", "form"), [
    ("linear", {"weights": (3.0,), "base": None}, lambda b, t, long: (t + 3 * long) / 4),
    ("ties", {"weights": (0.5,), "options": {"density": 0.3, "target.density": 0.8}},
     lambda b, t, long: ties(b, t, long, weight=0.5, densities=(0.8, 0.3))),
    ("slerp", {"options": {"t": 0.25}, "base": None},
     lambda b, t, long: slerp(b, t, long, t=0.25)),
], ids=["linear", "ties", "slerp"])
def test_closed_forms(llama, tmp_path, method, changes, form):
    out = merge_by_mergekit(asking(llama.models, method, **changes), tmp_path / "out")
    assert_merged(out, llama.models, form, **FP32)
    assert read_config(out).rope.rope_theta == LONG_THETA


def test_adapters_become_models_of_their_base(llama, tmp_path):
    """Two adapters of full rank are two deltas; the temporary models are gone afterwards."""
    out = merge_by_mergekit(
        asking(llama.models, "task_arithmetic", tuned=None, adapters=(llama.full, llama.full),
                weights=(0.5, 0.25)), tmp_path / "out")
    # The factors of the full-rank adapter are fp32 and give the delta to about 1e-6 of its norm.
    assert_merged(out, llama.models, lambda base, target, tuned: target + 0.75 * (tuned - base),
                  rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list(out.glob(".*"))
    text = (out / "mergekit_config.yml").read_text()
    assert f"# long2 was a temporary checkpoint: {llama.models.base} with {llama.full}" in text
    assert set(json.loads((out / "manifest.json").read_text())["inputs"]) == {
        "base", "target", "adapter1", "adapter2"}


def test_random_methods_repeat_by_seed(llama, tmp_path, monkeypatch):
    """DARE keeps each element with probability `density`; the seed decides which."""
    commands = []

    class Recorded(subprocess.Popen):
        def __init__(self, command, **options):
            commands.append(command)
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    asked = asking(llama.models, "dare_linear", options={
        "density": 0.5, "target.density": 1.0, "rescale": False, "seed": 7})
    first, again = (merge_by_mergekit(asked, tmp_path / name) for name in ("a", "b"))
    assert all(c[c.index("--random-seed") + 1] == "7" for c in commands) and len(commands) == 2
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert json.loads((first / "manifest.json").read_text())["seed"] == 7
    base, target, tuned = (tensors(d) for d in (
        llama.models.base, llama.models.target, llama.models.tuned))
    added = torch.cat([(x - target[name]).flatten() for name, x in tensors(first).items()])
    delta = torch.cat([(tuned[name] - base[name]).flatten() for name in tensors(first)])
    kept = added.abs() > 1e-6
    torch.testing.assert_close(added[kept], delta[kept], rtol=1e-3, atol=1e-6)
    # Of about 80000 elements, half: the share has a standard deviation below 0.002.
    assert abs(float(kept.float().mean()) - 0.5) < 0.011


def test_sharded_target_gets_its_own_shards_and_dtype(llama, tmp_path):
    target = save(AutoModelForCausalLM.from_pretrained(llama.models.target), tmp_path / "target",
                  torch.float32, max_shard_size="60KB")
    models = Models(llama.models.base, llama.models.tuned, target)
    assert len(list(target.glob("*.safetensors"))) > 2
    out = merge_by_mergekit(asking(models, "task_arithmetic", dtype="bfloat16"), tmp_path / "out")
    assert Checkpoint(out).file_of == Checkpoint(target).file_of
    assert {info.dtype for info in Checkpoint(out).infos.values()} == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert_merged(out, models, lambda base, target, tuned: target + tuned - base, rtol=2**-8,
                  atol=1e-7)  # rounded to the nearest bf16, from fp32


def no_process(*_, **__):
    raise AssertionError("mergekit was started")


@pytest.mark.parametrize(("method", "changes", "error", "parts"), [
    ("tiez", {}, RecipeError, ["unknown 'mergekit:tiez'", "did you mean 'mergekit:ties'?"]),
    ("passthrough", {}, RecipeError, ["unknown 'mergekit:passthrough'"]),
    ("ties", {"options": {"densty": 0.5}}, RecipeError,
     ["unknown option 'densty'", "did you mean 'density'?", "seed"]),
    ("ties", {"options": {"long2.density": 0.5}}, RecipeError,
     ["long2.density names no model", "target, long"]),
    ("ties", {"options": {"target.normalize": True}}, RecipeError, ["of one model (target)"]),
    ("ties", {"options": {"density": 1.5}}, RecipeError, ["density is 1.5", "at most 1"]),
    ("ties", {"options": {"density": "half"}}, RecipeError, ["density is 'half'"]),
    ("ties", {"options": {"lambda": float("inf")}}, RecipeError, ["lambda is inf", "finite"]),
    ("ties", {"options": {"density": [0.5, 0.0]}}, RecipeError, ["density is 0.0"]),
    ("ties", {"options": {"density": [{"filter": "mlp", "valu": 1}]}}, RecipeError,
     ["filter and value"]),
    ("ties", {"options": {"seed": 1.5}}, RecipeError, ["seed is 1.5"]),
    ("ties", {"options": {"weight": 0.5}}, RecipeError, ["--weight", "target.weight"]),
    ("ties", {"options": {"long.weight": 0.5}, "weights": (0.7,)}, RecipeError,
     ["0.7 by --weight", "0.5 by option"]),
    ("ties", {"weights": (float("nan"),)}, RecipeError, ["weight is nan"]),
    ("ties", {"weights": (1.0, 2.0)}, RecipeError, ["2 weights for 1 long models"]),
    ("della", {"options": {"density": 0.9}}, RecipeError, ["density is 0.9 and epsilon 0.15"]),
    ("slerp", {}, RecipeError, ["missing option t"]),
    ("slerp", {"options": {"t": 0.5}, "weights": (0.5,)}, RecipeError,
     ["has no weights, but weight is 0.5", "accepts t"]),
    ("ties", {"base": None}, RecipeError, ["give --base"]),
    ("ties", {"tuned": None}, RecipeError, ["give --adapter, or --tuned"]),
    ("linear", {"rope_from": Path("x")}, RecipeError, ["leave rope_from out"]),
    ("ties", {"dtype": "int3"}, ExtendError, ["int3"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_options_are_checked_before_anything_runs(llama, tmp_path, monkeypatch, method, changes,
                                                  error, parts):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    asked = asking(llama.models, method, **changes)
    with pytest.raises(error) as caught:
        merge_by_mergekit(asked, tmp_path / "out")
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value) in preview_by_mergekit(asked, tmp_path / "out").problems
    assert not list(tmp_path.iterdir())


def test_number_of_models_is_mergekits_to_judge(llama, tmp_path):
    two = asking(llama.models, "slerp", adapters=(llama.adapter,), weights=(1.0, 1.0),
                  options={"t": 0.5})
    with pytest.raises(RecipeError, match="exactly 2 inputs; got 3"):
        merge_by_mergekit(two, tmp_path / "out")
    itself = asking(llama.models, "ties", tuned=llama.models.target)
    with pytest.raises(RecipeError, match="Duplicate"):
        merge_by_mergekit(itself, tmp_path / "out")
    alone = asking(llama.models, "ties", tuned=None, base=None, adapters=(llama.adapter,))
    assert any("an adapter makes one only with its base; give --base" in problem
               for problem in preview_by_mergekit(alone, tmp_path / "out").problems)


def test_every_method_is_read_from_the_registry():
    """Spot checks on the registry of mergekit, so that a change of its meaning is seen."""
    methods = load_methods()
    assert {"mergekit:" + name for name in (
        "task_arithmetic", "ties", "dare_ties", "dare_linear", "della", "della_linear",
        "breadcrumbs", "breadcrumbs_ties", "sce", "linear", "slerp", "nuslerp", "multislerp",
        "karcher", "model_stock", "arcee_fusion", "nearswap")} <= set(methods)
    pairwise = {name for name, method in methods.items() if method.pairwise}
    assert pairwise == {"mergekit:slerp", "mergekit:nearswap", "mergekit:arcee_fusion"}
    assert methods["mergekit:ties"].base == "required"
    assert methods["mergekit:linear"].base == "forbidden"
    assert set(methods["mergekit:della"].per_model) == {"weight", "density", "epsilon"}


def test_check_method_for_recipes():
    check_method("mergekit:ties", {"density": 0.5, "long2.density": 0.25, "seed": 1})
    check_method("mergekit:ties", {"density": [{"filter": "mlp", "value": [0.2, 0.4]},
                                               {"value": 0.5}]})
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        check_method("mergekit:ties", {"long.densty": 0.5})


def test_another_vocabulary_is_refused_with_every_other_problem(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(Checkpoint, "read", no_process)
    target = save(build("llama", vocab_size=100, rope_parameters={
        "rope_type": "default", "rope_theta": 5e5}), tmp_path / "target", torch.float32)
    stored = load_file(target / "model.safetensors")
    save_file({**stored, "model.norm.weight": torch.zeros(64, dtype=torch.int8)},
              target / "model.safetensors", metadata={"format": "pt"})
    asked = asking(llama.models, "ties", target=target, options={"densty": 1})
    found = preview_by_mergekit(asked, tmp_path / "out")
    text = "\n".join(found.problems)
    for part in ("vocab_size is 96 in base but 100 in the target",
                 "vocab_size is 96 in tuned but 100 in the target", "pair them by token",
                 "model.norm.weight is I8", "rope_theta is 10000.0", "500000.0", "'densty'"):
        assert part in text
    with pytest.raises(CompatibilityError) as caught:
        merge_by_mergekit(asked, tmp_path / "out")
    assert all(problem in str(caught.value) for problem in found.problems)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_other_shapes_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    wide = save(build("llama", intermediate_size=128), tmp_path / "wide", torch.float32)
    with pytest.raises(CompatibilityError, match=r"shape \[128, 64\] in tuned but \[96, 64\] in "):
        merge_by_mergekit(asking(llama.models, "ties", tuned=wide), tmp_path / "out")


def test_long_models_of_two_ropes_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    other = Path(shutil.copytree(llama.models.tuned, tmp_path / "other"))
    edit_json(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 3e5})
    asked = asking(llama.models, "ties", tuned=other, adapters=(llama.adapter,),
                    weights=(1.0, 1.0))
    with pytest.raises(CompatibilityError, match="different RoPEs"):
        merge_by_mergekit(asked, tmp_path / "out")


def test_architecture_that_mergekit_would_write_in_part(llama, tmp_path, monkeypatch):
    """A tensor that its definition of Llama does not list would be lost without a word."""
    monkeypatch.setattr(subprocess, "Popen", no_process)
    copies = {}
    for role in ("base", "tuned", "target"):
        copies[role] = Path(shutil.copytree(getattr(llama.models, role), tmp_path / role))
        stored = load_file(copies[role] / "model.safetensors")
        save_file({**stored, "model.layers.0.self_attn.sinks": torch.zeros(4)},
                  copies[role] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match="would not write 1 of .*self_attn.sinks"):
        merge_by_mergekit(asking(Models(**copies), "ties"), tmp_path / "out")


def test_missing_mergekit_says_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(CompatibilityError, match=r"pip install 'mergekit>=0\.1\.5'"):
        merge_by_mergekit(asking(llama.models, "ties"), tmp_path / "out")


def test_failure_names_the_log_and_leaves_nothing_else(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_MODULE", "no_such_module")
    with pytest.raises(CheckpointError, match="exit code 1: .*No module named no_such_module") as e:
        merge_by_mergekit(asking(llama.models, "ties"), tmp_path / "out")
    log = tmp_path / "out.mergekit.log"
    assert str(log) in str(e.value)
    assert list(tmp_path.iterdir()) == [log]
    assert "no_such_module" in log.read_text()


def test_interrupt_ends_the_child(llama, tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        merge_by_mergekit(asking(llama.models, "ties"), tmp_path / "out")
    assert started[0].returncode == -9
    assert time.monotonic() - begin < 30
    assert not list(tmp_path.iterdir())


def test_overflow_is_an_error(llama, tmp_path):
    asked = asking(llama.models, "task_arithmetic", dtype="float16", options={"lambda": 1e9})
    with pytest.raises(CheckpointError, match="infinite or NaN values once merged as"):
        merge_by_mergekit(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_preview_announces_what_is_written(llama, tmp_path):
    found = preview_by_mergekit(asking(llama.models, "ties"), tmp_path / "out")
    assert found.problems == ()
    assert {info.name: info for info in found.tensors} == Checkpoint(llama.models.target).infos
    assert found.change.max_position_embeddings_after == LONG
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    problems = preview_by_mergekit(asking(llama.models, "ties"), tmp_path / "out").problems
    assert len(problems) == 1 and "exists already" in problems[0]
