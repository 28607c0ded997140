"""Frequencies equal those that transformers' own functions compute, for every family installed.

transformers computes in fp32. Here its functions run with a torch in which a float has 64 bits, so
that what is compared is the formulas and not the rounding.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from extend.errors import CompatibilityError
from extend.model_config import RopeSpec, read_rope, write_rope
from extend.model_config.families import FULL
from extend.rope.frequencies import attention_factor, inv_freq
from tests.rope import families

FACTOR = 4
_MSCALES = ("short_mscale", "long_mscale")  # which one family wants beside attention_factor


@pytest.fixture(scope="module")
def in_fp64():
    """transformers' RoPE functions with fp64 in place of fp32."""
    before = torch.get_default_dtype()
    modeling_rope_utils.torch = families.DoubleTorch()
    torch.set_default_dtype(torch.float64)
    yield
    modeling_rope_utils.torch = torch
    torch.set_default_dtype(before)


def test_every_family_is_read_or_named():
    found = families.installed()
    assert set(found.skipped) <= {families.NO_ARGUMENTS, families.NO_TOKENS, families.NO_DECODER,
                                  families.ODD, families.REFUSED}
    assert set(found.skipped[families.REFUSED]) <= families.REFUSED_FAMILIES
    counts = {reason: len(names) for reason, names in found.skipped.items()}
    assert len(found.read) > 150, counts  # 185 in transformers 5.24
    assert counts[families.NO_DECODER] < 12, found.skipped
    assert counts.get(families.ODD, 0) < 5, found.skipped
    assert {"llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "glm4",
            "olmo3", "deepseek_v3", "gpt_oss", "stablelm", "smollm3"} <= {
        family.name for family in found.read}


def scaled(kind: str, family: families.Family) -> RopeSpec:
    native = family.raw["max_position_embeddings"]
    dim = family.head_dim if kind == "proportional" else family.spec.rotary_dim
    pairs = dim // 2
    extra = {"yarn": {"original_max_position_embeddings": native, "beta_fast": 16.0},
             "llama3": {"original_max_position_embeddings": native, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0},
             "longrope": {"original_max_position_embeddings": native,
                          "short_factor": [1 + i / pairs for i in range(pairs)],
                          "long_factor": [1 + 3 * i / pairs for i in range(pairs)]},
             "proportional": {"partial_rotary_factor": 0.5}}.get(kind, {})
    return RopeSpec(rope_theta=family.spec.rope_theta, rotary_dim=dim, original_len=native,
                    scaling={"rope_type": kind, "factor": float(FACTOR), **extra})


def refused(family: families.Family, kind: str) -> bool:
    """Which families do not take a RoPE of this kind, from what their readers can do."""
    rope = family.raw["rope_parameters"]
    nested = any(isinstance(v, dict) for v in rope.values())
    share = (rope[FULL] if nested else rope).get("partial_rotary_factor", 1.0)
    whole = family.spec.rope_type == "proportional" or (
        share == 1 and family.spec.rotary_dim == family.head_dim)
    return (family.name in ("phi3", "phi4_multimodal", "phimoe") and kind != "longrope") or \
        (kind == "longrope" and nested) or (kind == "proportional" and not whole)


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_every_family_computes_the_same(kind, in_fp64):
    compared = 0
    for family in families.installed().read:
        spec = scaled(kind, family)
        native = spec.original_len
        try:
            written = write_rope(family.raw, spec, native if kind == "dynamic" else FACTOR * native)
        except CompatibilityError:
            assert refused(family, kind), family.name
            continue
        back = read_rope(written, family.head_dim, family.name)[0]
        assert replace(back, scaling={k: v for k, v in back.scaling.items() if k not in _MSCALES}) \
            == spec, family.name
        config = family.config_class.from_dict(written)
        for length in (native // 2, FACTOR * native) if spec.depends_on_length else (None,):
            check_equal(family.name, config, spec, length)
        compared += 1
    assert compared > 120, f"{compared} families have {kind}"


def check_equal(name: str, config, spec: RopeSpec, length: int | None) -> None:
    nested = {"layer_type": FULL} if FULL in config.rope_parameters else {}
    found, scaling = ROPE_INIT_FUNCTIONS[spec.rope_type](config, "cpu", seq_len=length, **nested)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, inv_freq(spec, length), rtol=1e-12, atol=0,
                               msg=lambda text: f"{name}: {text}")
    assert scaling == pytest.approx(expected_attention(config, spec), rel=1e-14), name


def expected_attention(config, spec: RopeSpec) -> float:
    if getattr(config, "model_type", "") == "phimoe":  # its own module reads the mscales, all 1
        spec = replace(spec, scaling={k: v for k, v in spec.scaling.items() if k not in _MSCALES})
    return attention_factor(spec)


@pytest.mark.parametrize("changes", [
    {"truncate": False}, {"attention_factor": 1.5}, {"mscale": 0.7, "mscale_all_dim": 1.0},
    {"mscale": 1.0, "mscale_all_dim": 1.0}, {"beta_fast": 4.0, "beta_slow": 0.5},
    {"beta_fast": 1.0, "beta_slow": 1.0}])
def test_every_option_of_yarn(changes, in_fp64):
    family = next(f for f in families.installed().read if f.name == "llama")
    spec = scaled("yarn", family)
    spec = replace(spec, scaling={**spec.scaling, **changes})
    config = family.config_class.from_dict(write_rope(family.raw, spec, FACTOR * spec.original_len))
    check_equal("llama", config, spec, None)


def test_plain_rope_of_every_causal_model():
    """The modules themselves, in fp32: they hold their own copy of the formula."""
    compared = 0
    for family in families.installed().read:
        if family.name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            continue
        plain = replace(family.spec, scaling={}, rope_theta=3 * family.spec.rope_theta)
        try:
            written = write_rope(family.raw, plain, plain.original_len)
        except CompatibilityError:
            assert family.name == "olmo3"
            continue
        config = family.config_class.from_dict(written)
        for module in rotary_modules(family):
            rotary = module(config)
            found = getattr(rotary, "inv_freq", getattr(rotary, f"{FULL}_inv_freq", None))
            # fp32 powers: exponent and logarithm each round once, times ln(theta) of about 20.
            torch.testing.assert_close(found.double(), inv_freq(plain), rtol=1e-5, atol=0,
                                       msg=lambda text, name=family.name: f"{name}: {text}")
            compared += 1
    assert compared > 80


def rotary_modules(family: families.Family) -> list[type]:
    name = family.config_class.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:  # the family runs on another's modules
        return []
    return [value for key, value in vars(module).items() if key.endswith("RotaryEmbedding")
            and "Vision" not in key and getattr(value, "__module__", "") == name]


def test_what_transformers_assumes_without_keys():
    """With no RoPE key in the config at all."""
    compared = 0
    for family in families.installed().read:
        if family.name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            continue
        bare = families.without_rope(family.raw)
        try:
            spec = read_rope(bare, family.head_dim if "head_dim" in bare else
                             families.head_dim_of(bare), family.name)[0]
        except CompatibilityError as error:
            assert "is not supported like this" in str(error)
            continue
        rope = family.config_class.from_dict(bare).rope_parameters
        rope = rope.get(FULL, rope)
        assert spec.rope_type == rope["rope_type"] == "default", family.name
        assert spec.rope_theta == rope["rope_theta"], family.name
        if "qk_rope_head_dim" not in bare:
            share = rope.get("partial_rotary_factor") or 1.0
            assert spec.rotary_dim == int(families.head_dim_of(bare) * share), family.name
        compared += 1
    assert compared > 80


def test_a_refused_family_is_refused_without_keys_too():
    refused_families = families.installed().skipped[families.REFUSED]
    assert refused_families
    for name in refused_families:
        bare = families.without_rope(CONFIG_MAPPING[name]().to_dict())
        with pytest.raises(CompatibilityError, match="is not supported like this"):
            read_rope(bare, families.head_dim_of(bare), name)
