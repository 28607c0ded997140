"""The form that every engine serves has the same B A in every module."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from extend.adapter import extract
from extend.adapter_format.peft_files import Adapter
from extend.adapter_format.serving import check_serving
from extend.adapter_format.serving_form import write_servable
from extend.errors import CheckpointError, CompatibilityError
from extend.merge import merge
from tests.adapter_format.serving_cases import CASES, SHAPES, Case, by_name, write_case

HELPED = ("plain", "bf16", "ranks differ between projections", "q below k", "rslora",
          "ranks of 0.95 energy", "alpha_pattern scales o_proj", "no q_proj", "no v_proj",
          "no gate_proj", "no k_proj in one layer", "no q_proj in one layer",
          "one layer not adapted", "targets as a pattern", "targets lack down_proj")


def without_reports(directory) -> None:
    """The sidecar of a case reports no modules; an adapter of this kind is not read as ours."""
    (directory / "extend_sidecar.json").unlink()


@pytest.mark.parametrize("name", HELPED)
def test_every_engine_serves_what_peft_computes(name, tmp_path):
    right = write_case(tmp_path / "adapter", CASES[name])
    gaps = name.startswith("no ")
    without_reports(tmp_path / "adapter")
    if gaps:
        with pytest.raises(CompatibilityError, match="stacked"):
            write_servable(tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = write_servable(tmp_path / "adapter", tmp_path / "out")
    assert [v.verdict for v in check_serving(out)] == ["ok"] * 3
    lora = Adapter(out)
    assert set(lora.modules) == set(right)
    for module, delta in right.items():
        lora_a, lora_b = lora.read_factors(module)
        # The same products, some with a scaling that PEFT applies to B A rather than to B.
        torch.testing.assert_close(lora_b @ lora_a, delta, rtol=1e-5, atol=1e-4)
        assert lora.modules[module].scaling == 1


@pytest.fixture(scope="module")
def uneven(copies_of, tmp_path_factory):
    """An adapter of our own with a rank of its own in each module, and one module unchanged."""
    root = tmp_path_factory.mktemp("uneven")
    return copies_of, extract(copies_of.base, copies_of.tuned, root / "adapter",
                              adapter_bytes=40_000), root


@pytest.fixture(scope="module")
def copies_of(llama, tmp_path_factory):
    """The Llama models, with one k_proj of the tuned one as it is in the base."""
    import shutil

    from safetensors.torch import save_file

    from tests.adapter_format.tiny_models import Models

    root = tmp_path_factory.mktemp("models")
    for name in ("base", "tuned", "target"):
        shutil.copytree(getattr(llama, name), root / name)
    base, tuned = (load_file(root / n / "model.safetensors") for n in ("base", "tuned"))
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({**tuned, name: base[name]}, root / "tuned" / "model.safetensors",
              metadata={"format": "pt"})
    return Models(base=root / "base", tuned=root / "tuned", target=root / "target")


def test_an_extraction_of_many_ranks(uneven, tmp_path):
    models, adapter, _ = uneven
    before = {v.engine: v.verdict for v in check_serving(adapter)}
    assert before == {"vllm-old": "ok", "vllm": "ok", "sglang": "refuses"}
    out = write_servable(adapter, tmp_path / "out")
    assert [v.verdict for v in check_serving(out)] == ["ok"] * 3
    assert json.loads((out / "manifest.json").read_text())["results"]["added"] == [
        "model.layers.1.self_attn.v_proj"]
    merged = [load_file(merge(path, models.target, tmp_path / name) / "model.safetensors")
              for path, name in ((adapter, "one"), (out, "other"))]
    for name, weight in merged[0].items():
        # Sums of the same products with zeros between them, in another order at most.
        torch.testing.assert_close(merged[1][name], weight, rtol=0, atol=1e-6, msg=name)


@torch.no_grad()
def test_peft_reads_it(uneven, tmp_path):
    models, adapter, _ = uneven
    out = write_servable(adapter, tmp_path / "out")
    tokens = torch.arange(12).reshape(1, 12)
    found = []
    for path in (adapter, out):
        model = AutoModelForCausalLM.from_pretrained(models.base)
        found.append(PeftModel.from_pretrained(model, path)(tokens).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_what_is_no_linear_factor_is_refused(tmp_path):
    write_case(tmp_path / "adapter", CASES["embedding"])
    without_reports(tmp_path / "adapter")
    with pytest.raises(CompatibilityError, match="embed_tokens"):
        write_servable(tmp_path / "adapter", tmp_path / "out")


def test_out_within_the_adapter_is_refused(tmp_path):
    write_case(tmp_path / "adapter", Case(rank=by_name(4, o_proj=8)))
    without_reports(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="lie in one another"):
        write_servable(tmp_path / "adapter", tmp_path / "adapter" / "out")
    assert len(SHAPES) == 7 and not (tmp_path / "adapter" / "out").exists()
