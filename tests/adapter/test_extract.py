"""The stage: the adapter directory that it writes, what it reports, and what it refuses."""

import hashlib
import json
import logging
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from extend.adapter import extract
from extend.checkpoint import StoredTensor
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.model_config import read_config
from tests.adapter_format.tiny_models import (
    LINEAR,
    LONG,
    LONG_THETA,
    NATIVE,
    THETA,
    edit_json,
    make_models,
)

FILES = {"adapter_config.json", "adapter_model.safetensors", "extend_lineage.safetensors",
         "extend_sidecar.json", "extend_sidecar.safetensors", "extend_vocabulary.json",
         "manifest.json", "report.html", "report.json", "serving.json", "SERVING.md"}


def read(path) -> dict:
    return json.loads(path.read_text())


def deltas(models) -> dict[str, torch.Tensor]:
    base = load_file(models.base / "model.safetensors")
    tuned = load_file(models.tuned / "model.safetensors")
    return {name: tuned[name].float() - base[name].float() for name in base}


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return extract(llama.base, llama.tuned, tmp_path_factory.mktemp("out") / "a", rank=8)


def test_writes_these_files_and_nothing_else(adapter):
    assert {file.name for file in adapter.iterdir()} == FILES
    assert not list(adapter.parent.glob(".*"))


def test_adapter_config_is_what_serving_engines_accept(adapter, llama):
    config = read(adapter / "adapter_config.json")
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8,
                "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none",
                "use_dora": False, "use_rslora": False, "lora_bias": False,
                "base_model_name_or_path": str(llama.base), "target_modules": sorted(LINEAR)}
    assert {key: config[key] for key in expected} == expected


def test_factor_names_and_shapes(adapter, llama):
    factors = load_file(adapter / "adapter_model.safetensors")
    base = load_file(llama.base / "model.safetensors")
    expected = {}
    for name, weight in base.items():
        if name.split(".")[-2] in LINEAR:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            expected[f"{module}.lora_A.weight"] = (8, weight.shape[1])
            expected[f"{module}.lora_B.weight"] = (weight.shape[0], 8)
    assert {name: tuple(t.shape) for name, t in factors.items()} == expected
    assert {t.dtype for t in factors.values()} == {torch.float32}


def test_sidecar_holds_the_exact_delta_of_everything_else(qwen2, tmp_path):
    out = extract(qwen2.base, qwen2.tuned, tmp_path / "a", rank=4)
    side, expected = load_file(out / "extend_sidecar.safetensors"), deltas(qwen2)
    rest = {n: d for n, d in expected.items() if n.split(".")[-2] not in LINEAR or "bias" in n}
    assert {n.rsplit(".", 2)[-2] for n in rest} == {
        "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj",
        "v_proj"}
    assert set(side) == set(rest)
    for name, delta in rest.items():
        torch.testing.assert_close(side[name], delta, rtol=0, atol=0)


def test_sidecar_describes_base_and_context(adapter, llama):
    sidecar = read(adapter / "extend_sidecar.json")
    assert sidecar["schema"] == 1
    assert sidecar["rope"]["before"]["rope_theta"] == THETA
    assert sidecar["rope"]["after"]["rope_theta"] == LONG_THETA
    assert sidecar["rope"]["max_position_embeddings_before"] == NATIVE
    keys = sidecar["rope"]["config_keys"]
    assert keys["max_position_embeddings"] == LONG
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == LONG_THETA
    base = sidecar["base"]
    config = read_config(llama.base)
    assert (base["architecture"], base["num_heads"], base["num_kv_heads"], base["head_dim"],
            base["vocab_size"], base["tied"]) == (config.architecture, 4, 2, 16, 96, False)
    assert base["shapes"]["lm_head.weight"] == [96, 64]
    assert len(base["shapes_sha256"]) == 64
    assert sidecar["sources"]["tuned"]["path"] == str(llama.tuned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reported_residuals_are_those_of_the_stored_factors(llama, tmp_path, dtype):
    out = extract(llama.base, llama.tuned, tmp_path / "a", rank=6, dtype=dtype)
    modules, expected = read(out / "extend_sidecar.json")["modules"], deltas(llama)
    base = load_file(llama.base / "model.safetensors")
    factors = load_file(out / "adapter_model.safetensors")
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert {t.dtype for t in factors.values()} == {stored}
    assert len(modules) == 14
    for module, report in modules.items():
        delta = expected[f"{module}.weight"].double()
        lora_a = factors[f"base_model.model.{module}.lora_A.weight"].double()
        lora_b = factors[f"base_model.model.{module}.lora_B.weight"].double()
        norm = torch.linalg.norm(delta)
        residual = float(torch.linalg.norm(delta - lora_b @ lora_a) / norm)
        # Reported from fp32 products, recomputed here in fp64.
        assert report["residual"] == pytest.approx(residual, rel=1e-5)
        assert report["delta_norm"] == pytest.approx(float(norm), rel=1e-6)
        weight = base[f"{module}.weight"].double()
        assert report["relative_norm"] == pytest.approx(float(norm / torch.linalg.norm(weight)),
                                                        rel=1e-6)
        best = torch.linalg.svdvals(delta)[6:].square().sum().sqrt() / norm
        assert report["residual"] >= float(best) * (1 - 1e-6)
        assert report["rank"] == 6
        kept = 1 - report["energy"]
        if dtype == "float32":
            assert kept == pytest.approx(residual ** 2, abs=1e-5)


def test_rank_is_capped_at_each_matrix(llama, tmp_path):
    """k_proj and v_proj are 32 x 64; the others have full rank 64."""
    out = extract(llama.base, llama.tuned, tmp_path / "a", rank=50)
    config = read(out / "adapter_config.json")
    capped = {f"model.layers.{i}.self_attn.{n}_proj": 32 for i in range(2) for n in "kv"}
    assert config["r"] == config["lora_alpha"] == 50
    assert config["rank_pattern"] == config["alpha_pattern"] == capped
    shapes = {n: t.shape for n, t in load_file(out / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"] == (32, 64)
    assert shapes["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] == (50, 64)


def test_rank_beyond_every_matrix_is_refused(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"rank is 65.*mlp\.\w+_proj\.weight \[\d+, \d+\].*"
                                          r"at most 64"):
        extract(llama.base, llama.tuned, tmp_path / "a", rank=65)
    assert not list(tmp_path.iterdir())


def test_energy_holds_in_every_module(llama, tmp_path):
    out = extract(llama.base, llama.tuned, tmp_path / "a", energy=0.9)
    modules, expected = read(out / "extend_sidecar.json")["modules"], deltas(llama)
    for module, report in modules.items():
        squares = torch.linalg.svdvals(expected[f"{module}.weight"].double()).square()
        exact = int((squares.cumsum(0) >= 0.9 * squares.sum()).int().argmax()) + 1
        assert report["rank"] == exact  # matrices this small are decomposed exactly
        assert report["residual"] ** 2 <= 0.1 + 1e-6
    config = read(out / "adapter_config.json")
    assert config["r"] == max(report["rank"] for report in modules.values())
    assert {**dict.fromkeys(modules, config["r"]), **config["rank_pattern"]} == {
        module: report["rank"] for module, report in modules.items()}


def test_a_model_in_fp32_gets_rank_32_by_default(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="extend"):
        out = extract(llama.base, llama.tuned, tmp_path / "a")
    assert read(out / "adapter_config.json")["r"] == 32
    assert read(out / "adapter_config.json")["rank_pattern"] == {}
    assert read(out / "manifest.json")["options"]["rule"] == "noise"
    assert f"{llama.tuned} is stored in F32" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 8, "energy": 0.9}, "rank is 8 and energy is 0.9; give one"),
    ({"rank": 0}, "rank is 0"), ({"rank": 2.5}, "rank is 2.5"), ({"rank": True}, "rank is True"),
    ({"energy": 0.0}, "energy is 0.0"), ({"energy": 1.5}, "energy is 1.5"),
    ({"dtype": "int8"}, "dtype: unknown 'int8'"), ({"device": "tpu"}, "device: unknown 'tpu'")])
def test_options_out_of_range(llama, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        extract(llama.base, llama.tuned, tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


def test_same_call_gives_the_same_bytes(llama, tmp_path):
    hashes = []
    for name in ("a", "b"):
        out = extract(llama.base, llama.tuned, tmp_path / name, rank=4, seed=7)
        torch.randn(3)
        hashes.append({file: hashlib.sha256((out / file).read_bytes()).hexdigest()
                       for file in FILES - {"manifest.json"}})
    assert hashes[0] == hashes[1]


def test_embeddings_left_out_are_reported(qwen2, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        out = extract(qwen2.base, qwen2.tuned, tmp_path / "a", rank=4, embeddings=False)
    name, sidecar = "model.embed_tokens.weight", read(out / "extend_sidecar.json")
    assert name not in load_file(out / "extend_sidecar.safetensors")
    norm = float(torch.linalg.norm(deltas(qwen2)[name].double()))
    assert sidecar["left_out"][name]["delta_norm"] == pytest.approx(norm, rel=1e-6)
    assert list(sidecar["left_out"]) == [name]
    assert read(out / "manifest.json")["results"]["left_out"] == [name]
    assert name in caplog.text


def test_unchanged_parameters_are_listed_not_stored(copies, tmp_path):
    from safetensors.torch import save_file

    base, tuned = (load_file(d / "model.safetensors") for d in (copies.base, copies.tuned))
    same = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    save_file({**tuned, **{n: base[n] for n in same}}, copies.tuned / "model.safetensors",
              metadata={"format": "pt"})
    out = extract(copies.base, copies.tuned, tmp_path / "a", rank=4)
    assert read(out / "extend_sidecar.json")["unchanged"] == sorted(same)
    stored = {*load_file(out / "extend_sidecar.safetensors"),
              *load_file(out / "adapter_model.safetensors")}
    assert not [key for key in stored if any(name.removesuffix(".weight") in key for name in same)]
    # up_proj of layer 1 only, by its full name; the other kinds by their short one.
    assert read(out / "adapter_config.json")["target_modules"] == sorted(
        [*set(LINEAR) - {"up_proj"}, "model.layers.1.mlp.up_proj"])


def test_fresh_bias_has_no_relative_norm(tmp_path):
    from safetensors.torch import save_file

    models = make_models(tmp_path / "m", "qwen2", torch.float32)
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(models.base / "model.safetensors")
    save_file({**tensors, name: torch.zeros_like(tensors[name])},
              models.base / "model.safetensors", metadata={"format": "pt"})
    out = extract(models.base, models.tuned, tmp_path / "a", rank=4)
    assert read(out / "extend_sidecar.json")["tensors"][name]["relative_norm"] is None


def test_equal_weights_are_refused(llama, tmp_path):
    with pytest.raises(CompatibilityError, match=r"no linear weight of .* differs"):
        extract(llama.base, llama.base, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_factors_that_overflow_are_refused(copies, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(copies.tuned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e12
    save_file(tensors, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*overflow.*--dtype bf16 or fp32"):
        extract(copies.base, copies.tuned, tmp_path / "a", rank=4, dtype="float16")


def test_existing_output_is_kept_unless_told(adapter, llama):
    before = (adapter / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        extract(llama.base, llama.tuned, adapter, rank=4)
    assert (adapter / "manifest.json").read_bytes() == before


def test_overwrite_replaces(llama, tmp_path):
    extract(llama.base, llama.tuned, tmp_path / "a", rank=4)
    out = extract(llama.base, llama.tuned, tmp_path / "a", rank=5, overwrite=True)
    assert read(out / "adapter_config.json")["r"] == 5


def test_failure_half_way_leaves_nothing(copies, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(copies.tuned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copies.tuned / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        extract(copies.base, copies.tuned, tmp_path / "out" / "a", rank=4)
    assert not list((tmp_path / "out").iterdir())


def test_sharded_models_give_the_same_adapter(llama, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    for name in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(getattr(llama, name))
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    out = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=8)
    for file in ("adapter_model.safetensors", "extend_sidecar.safetensors"):
        assert (out / file).read_bytes() == (adapter / file).read_bytes()


def test_one_line_per_layer_and_a_summary(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="extend"):
        extract(llama.base, llama.tuned, tmp_path / "a", rank=4)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines[:-2]] == ["layer 1 of 2", "layer 2 of 2"]
    assert lines[-2].startswith("adapter of 14 modules, ")
    assert lines[-1].startswith("as served by vllm ok (--max-lora-rank 8), sglang ok")


def test_reads_a_few_tensors_ahead_and_no_more(llama, tmp_path, monkeypatch):
    """A pair of blocks in work, however many matrices there are: those ahead stay on the disk."""
    alive: list[weakref.ref] = []
    most = SimpleNamespace(count=0)
    lock, read_tensor = threading.Lock(), StoredTensor.read

    def counting(self, *arguments, **options):
        tensor = read_tensor(self, *arguments, **options)
        with lock:
            alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
            most.count = max(most.count, len(alive))
        return tensor
    monkeypatch.setattr(StoredTensor, "read", counting)
    extract(llama.base, llama.tuned, tmp_path / "a", rank=4)
    # Two for the sidecar, which is written at the same time.
    assert 2 <= most.count <= 2 + 2


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu", "cpu,cpu,cpu"])
def test_the_number_of_devices_does_not_change_a_byte(llama, tmp_path, device):
    one, many = (extract(llama.base, llama.tuned, tmp_path / name, adapter_bytes=47_111, device=d)
                 for name, d in (("one", "cpu"), ("many", device)))
    for file in FILES - {"manifest.json"}:
        assert (one / file).read_bytes() == (many / file).read_bytes()


def test_manifest_records_inputs_and_results(adapter, llama):
    manifest = read(adapter / "manifest.json")
    assert manifest["stage"] == "extract"
    assert manifest["options"] == {"rule": "fixed", "rank": 8, "energy": None, "exact": False,
                                   "adapter_bytes": None, "embeddings": True,
                                   "fold_norms": False, "dtype": "float32"}
    assert manifest["inputs"]["base"]["path"] == str(llama.base)
    assert set(manifest["outputs"]) == FILES - {"manifest.json"}
    sidecar = read(adapter / "extend_sidecar.json")
    residuals = [report["residual"] for report in sidecar["modules"].values()]
    assert manifest["results"]["mean_residual"] == pytest.approx(sum(residuals) / 14)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert manifest["results"]["adapter_bytes"] == size
    assert sidecar["sources"]["base"]["sha256"] == manifest["inputs"]["base"]["sha256"]


def test_product_equals_mergekits(llama, adapter):
    """mergekit decomposes by a full SVD; the products agree, the factors up to sign."""
    module = pytest.importorskip("mergekit.scripts.extract_lora")
    name = "model.layers.1.self_attn.k_proj"
    delta = deltas(llama)[f"{name}.weight"]
    task = SimpleNamespace(transpose=False, sv_epsilon=0, max_rank=8, distribute_scale=True)
    lora_a, lora_b = module.TaskVectorDecompositionTask.execute(task, task_vector=delta)
    ours = load_file(adapter / "adapter_model.safetensors")
    product = (ours[f"base_model.model.{name}.lora_B.weight"]
               @ ours[f"base_model.model.{name}.lora_A.weight"])
    ours, theirs = (float(torch.linalg.norm(delta - p)) for p in (product, lora_b @ lora_a))
    assert ours == pytest.approx(theirs, rel=1e-5)  # a matrix this small is decomposed exactly
    torch.testing.assert_close(product, lora_b @ lora_a, rtol=0, atol=1e-6)


def test_edited_config_of_the_long_model_travels(copies, tmp_path):
    """Scaled RoPE and sliding-window keys of the long model are what merge will write."""
    edit_json(copies.tuned / "config.json", sliding_window=None, layer_types=["full_attention"] * 2,
              rope_scaling=None, rope_theta=THETA, rope_parameters={
                  "rope_type": "yarn", "factor": 8.0, "rope_theta": THETA,
                  "original_max_position_embeddings": NATIVE})
    out = extract(copies.base, copies.tuned, tmp_path / "a", rank=4)
    keys = read(out / "extend_sidecar.json")["rope"]["config_keys"]
    assert keys["rope_scaling"] == keys["rope_parameters"]
    assert keys["rope_parameters"]["rope_type"] == "yarn"
    assert keys["original_max_position_embeddings"] == NATIVE
    assert keys["layer_types"] == ["full_attention"] * 2
    assert keys["sliding_window"] is None
