"""`import` against the models that files were made from, and gguf's own dequantization."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from extend.cli import main
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.gguf import import_gguf, stage
from extend.gguf.rope import FACTORS
from extend.manifest import MANIFEST_NAME
from extend.model_config import read_config
from extend.run import run
from tests.gguf.writing import F32, make_model, names_of, permute, word_tokens, write_gguf

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def models():
    return {family: make_model(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def small(models, tmp_path_factory) -> Path:
    """A whole file of a Llama."""
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", models["llama"],
                      keys=word_tokens())


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: model.state_dict()[name] for name in names_of(model)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_comes_back_bit_for_bit(family, models, tmp_path):
    model = models[family]
    file = write_gguf(tmp_path / "m.gguf", model, keys=word_tokens())
    out = import_gguf(file, tmp_path / "out", dtype="float32")
    assert_same(load_file(out / "model.safetensors"), weights_of(model))
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    skipped = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    ours, theirs = found.config.to_dict(), model.config.to_dict()
    differing = {key for key in theirs if ours.get(key) != theirs[key]} - skipped
    assert not differing, {key: (ours.get(key), theirs[key]) for key in differing}
    ids = torch.arange(3, 40)[None]  # longer than the sliding window
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).encode("!?") != []


BLOCK = {Type.Q4_K: (144, ((0, 2),)), Type.Q6_K: (210, ((208, 1),))}  # bytes; fp16 scales


def random_blocks(rows: int, kind: Type, seed: int) -> np.ndarray:
    """Rows of one block of 256 values each, whose scales are small numbers."""
    size, scales = BLOCK[kind]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, size), dtype=np.uint8)
    for start, count in scales:
        data[:, start:start + 2 * count] = generator.uniform(
            1e-4, 1e-3, (rows, count)).astype(np.float16).view(np.uint8)
    return data


def test_every_kind_of_block_as_gguf_reads_it(tmp_path, monkeypatch):
    model = make_model("llama", num_hidden_layers=1)
    types = {"embed_tokens": Type.Q8_0, "q_proj": Type.Q4_0, "k_proj": Type.Q4_1,
             "v_proj": Type.Q5_0, "o_proj": Type.Q5_1, "gate_proj": Type.F16,
             "lm_head": Type.BF16, "up_proj": Type.Q8_0}
    file = write_gguf(tmp_path / "m.gguf", model, types, word_tokens())
    for kind in BLOCK:  # put in place of the rows of ffn_down
        blocks = random_blocks(64, kind, seed=1)
        k_file = with_down_proj(tmp_path, model, types, blocks, kind)
        check_against_gguf(k_file, tmp_path / kind.name, {"ffn_down": kind})
    monkeypatch.setattr(stage, "_BLOCK_VALUES", 500)  # some rows at a time
    check_against_gguf(file, tmp_path / "rows", {})


def with_down_proj(folder: Path, model, types, blocks: np.ndarray, kind: Type) -> Path:
    import tests.gguf.writing as writing

    path, whole = folder / f"{kind.name}.gguf", writing.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "quantize", lambda data, wanted: (
            blocks if wanted == kind else whole(data, wanted)))
        return write_gguf(path, model, {**types, "down_proj": kind}, word_tokens())


def check_against_gguf(file: Path, out: Path, kinds: dict[str, Type]) -> None:
    config = {"attn_q": 4, "attn_k": 2}
    found = load_file(import_gguf(file, out, dtype="bfloat16") / "model.safetensors")
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    table = {new: old for old, new in names_of(make_model("llama", num_hidden_layers=1)).items()}
    assert set(table) == set(tensors)
    for name, tensor in tensors.items():
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        ours, heads = found[table[name]].float(), config.get(name.split(".")[-2])
        if heads:  # permuted again, so that nothing of the code that undoes it is used
            ours = torch.from_numpy(permute(ours.numpy(), heads))
        torch.testing.assert_close(ours, values.to(torch.bfloat16).float(), rtol=0, atol=0)
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    record = json.loads((out / MANIFEST_NAME).read_text())
    assert record["results"]["quantization"] == counts
    assert all(tensors[f"blk.0.{part}.weight"].tensor_type == kind for part, kind in kinds.items())


def rope_of(tmp_path: Path, keys: dict, raw: dict | None = None):
    file = write_gguf(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1),
                      keys={**word_tokens(), **keys}, raw=raw or {})
    return import_gguf(file, tmp_path / "out", overwrite=True)


def test_rope_scalings(tmp_path):
    out = rope_of(tmp_path, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert read_config(out).rope.scaling == {"rope_type": "linear", "factor": 4.0}
    out = rope_of(tmp_path, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                             "rope.scaling.original_context_length": 128,
                             "rope.scaling.attn_factor": 1.1, "rope.scaling.yarn_beta_fast": 16.0})
    assert read_config(out).rope.scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        "attention_factor": 1.1, "beta_fast": 16.0}


@pytest.mark.parametrize("native", [8192, 2048, 3000])
def test_llama3_scaling_is_read_from_its_factors(native, tmp_path):
    """What transformers computes from the keys must be what the file divides by."""
    made = AutoConfig.for_model("llama", head_dim=32, max_position_embeddings=8 * native,
                                rope_parameters={
                                    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": native})
    plain = 50000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](made, "cpu")[0]).float().numpy()
    # Some pairs are left alone, some are slowed by the whole factor, some lie between.
    assert (factors < 1.001).any() and (factors > 7.999).any()
    assert ((factors > 1.001) & (factors < 7.999)).any()
    out = rope_of(tmp_path, {"context_length": 8 * native}, {FACTORS: (factors, F32)})
    assert AutoConfig.from_pretrained(out).rope_parameters == made.rope_parameters
    with pytest.raises(CompatibilityError, match="are not those of Llama 3.1's scaling from 8192"):
        rope_of(tmp_path, {}, {FACTORS: (factors + np.float32(0.01), F32)})


def why(error: type[Exception], file: Path, out: Path, **options) -> str:
    with pytest.raises(error) as told:
        import_gguf(file, out, **options)
    assert not out.exists() and not list(out.parent.glob(".out.*"))
    return str(told.value)


def test_what_is_not_understood_is_refused(small, tmp_path):
    model, out = make_model("llama", num_hidden_layers=1), tmp_path / "out"
    cases = {
        "its architecture is 'mamba'; imported are llama": {".general.architecture": "mamba"},
        "llama.expert_count would change what the model computes": {"expert_count": 8},
        "rope.scaling.type is 'longrope'; supported are none, linear, yarn": {
            "rope.scaling.type": "longrope"},
        "rope.dimension_count is 16 but heads have 32 channels": {"rope.dimension_count": 16},
        "attn_factor is for yarn, but rope.scaling.type is 'none'": {
            "rope.scaling.attn_factor": 2.0},
        "tokenizer.ggml.pre is 'viking'; known are llama-bpe": {".tokenizer.ggml.pre": "viking"},
        "its tokenizer is 'bert'; built are gpt2, llama": {".tokenizer.ggml.model": "bert"}}
    for number, (message, keys) in enumerate(cases.items()):
        file = write_gguf(tmp_path / f"{number}.gguf", model, keys={**word_tokens(), **keys})
        assert message in why(CompatibilityError, file, out)
    file = write_gguf(tmp_path / "more.gguf", model, keys=word_tokens(),
                      raw={"blk.0.ffn_gate_inp.weight": (np.zeros((8, 64), np.float32), F32)})
    assert "1 tensors are not known for llama, the first 'blk.0.ffn_gate_inp.weight'" in why(
        CompatibilityError, file, out)
    file = write_gguf(tmp_path / "less.gguf", model, keys={**word_tokens(), "block_count": 2})
    assert "model.layers.1.self_attn.v_proj.weight is missing" in why(CompatibilityError, file, out)


def test_damaged_files_and_values(small, tmp_path):
    out = tmp_path / "out"
    file = tmp_path / "cut.gguf"
    file.write_bytes(small.read_bytes()[:-100])
    assert "truncated" in why(CheckpointError, file, out) or "again" in why(
        CheckpointError, file, out)
    file.write_bytes(b"GGML" + bytes(100))
    assert "cannot be read as GGUF" in why(CheckpointError, file, out)
    assert "nothing.gguf is not there; give a GGUF file" in why(
        CheckpointError, tmp_path / "nothing.gguf", out)
    assert "choose one of float32, bfloat16, float16" in why(RecipeError, small, out, dtype="int8")
    model = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    file = write_gguf(tmp_path / "large.gguf", model, keys=word_tokens())
    assert "'output_norm.weight' holds values that are infinite or NaN in float16" in why(
        CheckpointError, file, out, dtype="float16")


def test_parts(models, small, tmp_path):
    write_gguf(tmp_path / "m.gguf", models["llama"], keys=word_tokens(), split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3 and re.fullmatch(r"m-00001-of-00003.gguf", parts[0].name)
    out = import_gguf(parts[0], tmp_path / "out", dtype="float32")
    assert_same(load_file(out / "model.safetensors"), weights_of(models["llama"]))
    assert list(json.loads((out / MANIFEST_NAME).read_text())["inputs"]) == [
        "file", "file.2", "file.3"]
    parts[2].unlink()
    with pytest.raises(CheckpointError, match="m-00003-of-00003.gguf is not there; all 3 parts"):
        import_gguf(parts[0], tmp_path / "again")


def test_command_and_recipe_from_the_hub(hub, small, tmp_path):
    sha = hub.add("lab/small-GGUF", {"small.gguf": small.read_bytes(), "other.gguf": b"x" * 99,
                                     "README.md": "x"})
    result = CliRunner().invoke(main, ["import", "lab/small-GGUF:small.gguf", "--dtype", "float32",
                                       "--out", str(tmp_path / "a"), "--json"])
    assert json.loads(result.stdout) == {"output": str(tmp_path / "a")}, result.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n"
        "  - {name: base, stage: import, file: 'lab/small-GGUF:small.gguf', dtype: float32,\n"
        f"     tokenizer: {tmp_path / 'a'}}}\n"
        "  - {name: long, stage: rescale, model: base, to: 1k, method: ntk}\n")
    run(recipe, tmp_path / "runs")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "runs" / "base" / name).read_bytes() == \
            (tmp_path / "a" / name).read_bytes()
    entry = json.loads((tmp_path / "runs" / "base" / MANIFEST_NAME).read_text())["inputs"]["file"]
    assert entry["path"] == f"lab/small-GGUF@{sha}:small.gguf"
    assert read_config(tmp_path / "runs" / "long").max_position_embeddings == 1024
    assert hub.count("GET", "other.gguf") == 0 and hub.count("GET", "/resolve/") == 1
