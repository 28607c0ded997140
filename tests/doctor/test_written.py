"""What this toolkit writes passes, or fails for a reason that is true of an engine."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import extend
from extend.doctor import doctor
from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import parse_config, write_rope
from extend.model_config.families import LLAMA_CPP
from extend.rope import METHODS
from extend.rope.engines import differing_engines
from extend.rope.methods import apply_method
from extend.rope.presets import PRESETS
from tests.doctor.configs import llama, load, save
from tests.pipeline import write_inputs
from tests.rope.conftest import NATIVE, write_tokenizer

TARGET = 16 * NATIVE
PAIRS = 8
OPTIONS = {"theta": {"rope_theta": 2e6},
           "longrope": {"long_factor": [1.0 + i for i in range(PAIRS)]},
           "proportional": {"partial_rotary_factor": 0.5}}
# What no config.json can prevent, by method: (what, readers).
TRUE_OF_ENGINES = {
    "linear": {("maximum length", ("vllm-old", "vllm", "sglang"))},
    "longrope": {("frequencies", ("llama.cpp",))},
    "proportional": {("loading", ("transformers-4.4", "transformers-4", "vllm-old", "sglang")),
                     ("frequencies", ("llama.cpp",))},
}
SKIPPED = {"dynamic"}  # refused for writing, with the reason


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("source") / "llama"
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=NATIVE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"max_length": 256}')
    return directory


def problems(diagnosis):
    return {(finding.what, finding.readers) for finding in diagnosis.errors}


def rescale(source, out, method, **options):
    """With every method, or None where it is for other bases than the tiny one."""
    try:
        return extend.rescale(source, out, target_len=TARGET, method=method,
                              **{**OPTIONS.get(method, {}), **options})
    except extend.RecipeError:
        assert method in SKIPPED
    except CompatibilityError as error:
        assert "was published for models of theta" in str(error)
    return None


def test_the_source_is_what_transformers_5_writes(source):
    """And what it writes, transformers 4 reads with theta 10000: here by luck the right one."""
    assert "rope_theta" not in load(source)
    assert problems(doctor(source)) == set()


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, source, tmp_path):
    out = rescale(source, tmp_path / "out", method)
    if out is None:
        return
    found = doctor(out)
    assert problems(found) == TRUE_OF_ENGINES.get(method, set()), found.to_text()
    assert not found.questions
    assert not found.changes  # what is written is the portable form already


@pytest.mark.parametrize("method", ["ntk", "yarn", "ntk-by-parts"])
def test_resonance(method, source, tmp_path):
    out = rescale(source, tmp_path / "out", method, resonance=True)
    assert problems(doctor(out)) == TRUE_OF_ENGINES["longrope"]


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "stablelm")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in {*SKIPPED, *PRESETS}])
def test_every_method_in_every_family(method, family, tmp_path):
    """The written config alone; llama3 reaches llama.cpp in Llama and Mistral only."""
    raw = {**llama(num_hidden_layers=6, head_dim=64, sliding_window=None),
           "model_type": family, "pad_token_id": 0}
    spec = parse_config(raw, tmp_path).rope
    options = dict(OPTIONS.get(method, {}))
    if method == "longrope":
        options["long_factor"] = [2.0] * (spec.rotary_dim // 2)
    if method == "proportional" and family == "stablelm":
        return  # rotates a part of each head, and says so
    written = write_rope(raw, apply_method(method, spec, 65536, options), 65536)
    found = doctor(save(tmp_path / "model", written))
    expected = set(TRUE_OF_ENGINES.get(method, set()))
    if method in ("ntk-by-parts", "llama3") and family not in ("llama", "mistral"):
        expected = {("frequencies", ("llama.cpp",))}
    if family == "gemma3_text":  # never multiplied; what SGLang does with its scaling is not known
        expected = {(what, tuple(n for n in names if n != "sglang")) for what, names in expected
                    if method != "linear"}
    assert problems(found) == expected, found.to_text()
    assert not found.questions and not found.changes


NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp",
         "transformers-4": "transformers 4"}
VARIANTS = [("linear", {}), ("ntk", {}), ("llama3", {}), ("yarn", {}),
            ("yarn", {"truncate": False}),
            ("yarn", {"attention_factor": 1.0}),
            ("yarn", {"mscale": 1.0, "mscale_all_dim": 0.5}),
            ("longrope", {}), ("longrope", {"attention_factor": 1.2}),
            ("longrope", {"short": True}), ("longrope", {"short": True, "attention_factor": 1.2}),
            ("proportional", {"partial_rotary_factor": 0.5}), ("critical", {"resonance": True}),
            ("yarn", {"resonance": True})]


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_rescale_names_the_engines_that_the_doctor_finds(method, options, tmp_path):
    compared = 0
    for family in set(LLAMA_CPP) - {"gpt_neox"}:  # which the stage refuses by its tensors' names
        raw = {**llama(num_hidden_layers=6, head_dim=64, sliding_window=None, pad_token_id=0),
               "model_type": family}
        spec = parse_config(raw, tmp_path).rope
        pairs, own = spec.rotary_dim // 2, {k: v for k, v in options.items() if k != "short"}
        if method == "longrope":
            own |= {"long_factor": [2.0] * pairs} | (
                {"short_factor": [1.0] * pairs} if "short" in options else {})
        before = doctor(save(tmp_path / "before", write_rope(raw, spec, 4096)))
        try:
            new = apply_method(method, spec, 65536, own)
            found = doctor(save(tmp_path / "model", write_rope(raw, new, 65536)))
        except CompatibilityError:
            continue  # this family's readers do not agree on such a RoPE, and it says so
        unknown = {r.reader for r in found.readings if r.unknown}
        always = {name for finding in before.errors for name in finding.readers}
        named = {name for name, text in NAMES.items() if name not in unknown | always
                 and any(text in clause for clause in differing_engines(family, new))}
        errors = {name for finding in found.errors for name in finding.readers}
        assert named == errors & set(NAMES) - always, (family, found.to_text())
        compared += 1
    assert compared > 0


@pytest.mark.parametrize(("name", "length"), [
    (name, length) for name, preset in PRESETS.items() for length in preset.thetas])
def test_presets(name, length, tmp_path):
    theta, native = PRESETS[name].base
    raw = llama(hidden_size=4096, num_attention_heads=32, rope_theta=theta,
                max_position_embeddings=native)
    spec = apply_method(name, parse_config(raw, tmp_path).rope, length, {})
    found = doctor(save(tmp_path / "model", write_rope(raw, spec, length)))
    assert found.ok and not [f for f in found.findings if f.severity != "note"], found.to_text()


def test_yarn_with_an_attention_factor(source, tmp_path):
    """True of llama.cpp alone: the others are told in the key that each reads."""
    out = rescale(source, tmp_path / "out", "yarn", attention_factor=1.0)
    found = doctor(out)
    assert problems(found) == {("attention factor", ("llama.cpp",))}, found.to_text()
    assert not found.changes


def test_longrope_with_two_lists(source, tmp_path):
    """Of the attention factor all but llama.cpp think alike, also when it is not the usual one."""
    out = rescale(source, tmp_path / "out", "longrope", short_factor=[1.0] * PAIRS)
    found = doctor(out)
    factors = {r.reader: r.main.attention_factor for r in found.readings}
    assert factors == dict.fromkeys(factors, 1.0)
    assert not found.changes and not found.questions


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Every stage, once."""
    directory = tmp_path_factory.mktemp("pipeline")
    recipe = write_inputs(directory)
    text = recipe.read_text().replace("nproc: 2", "nproc: 1")
    recipe.write_text("\n".join(line for line in text.splitlines()
                                if "stage: eval" not in line and "stage: report" not in line
                                and "trials:" not in line))
    return extend.run(recipe, directory / "out")


@pytest.mark.parametrize("stage", ["rescaled", "long", "sibling", "merged"])
def test_every_stage(stage, pipeline):
    directory = next(path for path in pipeline.rglob(stage) if (path / "config.json").is_file())
    found = doctor(directory)
    assert found.ok, found.to_text()


def test_adapter(pipeline):
    directory = next(path for path in pipeline.rglob("adapter")
                     if (path / "adapter_config.json").is_file())
    found = doctor(directory)
    assert found.ok and "an adapter" in found.architecture, found.to_text()
    assert {r.max_len for r in found.readings} == {128}
    with pytest.raises(CompatibilityError, match="not changed"):
        doctor(directory, fix=True)


def test_adapter_whose_record_is_not_complete(pipeline, tmp_path):
    import json

    source = next(path for path in pipeline.rglob("adapter")
                  if (path / "adapter_config.json").is_file())
    target = tmp_path / "adapter"
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    sidecar = load(source, "extend_sidecar.json")
    del sidecar["rope"]["config_keys"]["rope_theta"]
    (target / "extend_sidecar.json").write_text(json.dumps(sidecar))
    found = doctor(target)
    assert not found.ok
    assert any("records no rope_theta" in f.message for f in found.errors)
    del sidecar["rope"]["config_keys"]["max_position_embeddings"]
    (target / "extend_sidecar.json").write_text(json.dumps(sidecar))
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        doctor(target)
