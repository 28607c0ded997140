"""Good and damaged LoRA adapters for a tiny Llama, and what engines made of them.

`VERDICTS` was seen: the loaders of vLLM 0.11.0, vLLM 0.33.0 and SGLang 0.5.23 read each of these
directories on a CPU (`scripts/check_serving_rules.py` runs them again), and what then lay in their
buffers was compared with PEFT's delta.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from extend.adapter_format.sidecar import ModelIdentity, RopeChange, Sidecar
from extend.checkpoint import TensorInfo
from extend.model_config import parse_config

PREFIX = "base_model.model."
VOCAB, HIDDEN, KV, INNER, LAYERS = 96, 64, 32, 96, 2
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN),
          "self_attn.v_proj": (KV, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
          "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
          "mlp.down_proj": (HIDDEN, INNER)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
          "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
          "rope_theta": 10000.0}
NAMES = sorted({m.rpartition(".")[2] for m in SHAPES})
LAYER_0 = f"{PREFIX}model.layers.0."


@dataclass(frozen=True)
class Case:
    """One adapter: ranks by module, and what is done to the files afterwards."""

    rank: Callable[[str], int] = lambda module: 8
    config: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rename: Callable[[str], str] = lambda key: key
    dtype: torch.dtype = torch.float32
    added_tokens: dict[str, int] | None = None


def by_name(default: int, **ranks: int) -> Callable[[str], int]:
    return lambda module: ranks.get(module.rpartition(".")[2], default)


def write_case(directory: Path, case: Case) -> dict[str, torch.Tensor]:
    """Write the adapter with a sidecar that knows its base; return PEFT's delta by module."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors, ranks = {}, {}
    for name, (out, inside) in ((f"model.layers.{i}.{m}", shape) for i in range(LAYERS)
                                for m, shape in SHAPES.items()):
        rank = case.rank(name)
        factors = (torch.randn(rank, inside, generator=generator),
                   torch.randn(out, rank, generator=generator))
        if name in case.drop or name.split(".", 3)[3] in case.drop:
            continue
        ranks[name] = rank
        for letter, factor in zip("AB", factors):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = factor.to(case.dtype)
    for name, shape in case.extra.items():
        tensors[name] = torch.randn(shape, generator=generator)
    tensors = {case.rename(key): value for key, value in tensors.items() if key not in case.drop}
    largest = max(ranks.values())
    smaller = {m: r for m, r in ranks.items() if r < largest}
    config = {"peft_type": "LORA", "r": largest, "lora_alpha": largest, "rank_pattern": smaller,
              "alpha_pattern": smaller, "target_modules": NAMES, "bias": "none",
              "modules_to_save": None, **case.config}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if case.added_tokens is not None:
        (directory / "added_tokens.json").write_text(json.dumps(case.added_tokens))
    sidecar().write(directory)
    right = {module: scaling(config, module) * product(tensors, case, module) for module in ranks
             if all(f"{PREFIX}{module}.lora_{x}.weight" not in case.drop for x in "AB")}
    if f"{EMBEDDING}A" in tensors:
        right["model.embed_tokens"] = tensors[f"{EMBEDDING}B"] @ tensors[f"{EMBEDDING}A"]
    return right


def product(tensors: dict[str, torch.Tensor], case: Case, module: str) -> torch.Tensor:
    lora_a, lora_b = (tensors[case.rename(f"{PREFIX}{module}.lora_{x}.weight")] for x in "AB")
    return lora_b.float() @ lora_a.float()


def scaling(config: dict[str, Any], module: str) -> float:
    """As PEFT's `get_pattern_key` and `update_layer` have it."""
    def pick(pattern: dict[str, Any], default: float) -> float:
        return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank = pick(config["rank_pattern"], config["r"])
    alpha = pick(config["alpha_pattern"], config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def sidecar() -> Sidecar:
    config = parse_config(CONFIG, Path("config.json"))
    shapes = {f"model.layers.{i}.{m}.weight": s for i in range(LAYERS) for m, s in SHAPES.items()}
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
               "model.norm.weight": (HIDDEN,)}
    infos = {name: TensorInfo(name, "F32", shape) for name, shape in shapes.items()}
    return Sidecar(rope=RopeChange.between(config, config), base=ModelIdentity.of(config, infos),
                   sources={}, extraction={}, modules={}, tensors={}, left_out={}, unchanged=[])


def _factor_names(key: str) -> str:
    return re.sub(r"lora_([AB])\.weight", r"lora_\1.default.weight", key)


EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding_"
CASES: dict[str, Case] = {
    "plain": Case(),
    "bf16": Case(dtype=torch.bfloat16),
    "rank 12": Case(rank=by_name(12)),
    "rank 600": Case(rank=by_name(600)),
    "ranks differ between projections": Case(rank=by_name(5, o_proj=8)),
    "q below k": Case(rank=by_name(8, q_proj=5)),
    "ranks of 0.95 energy": Case(config={"r": 1, "lora_alpha": 1, "rank_pattern": {".*_proj": 8},
                                         "alpha_pattern": {".*_proj": 8}}),
    "alpha twice r": Case(config={"lora_alpha": 16}),
    "rslora": Case(config={"use_rslora": True}),
    "alpha_pattern scales o_proj": Case(config={"alpha_pattern": {"o_proj": 16}}),
    "dora": Case(config={"use_dora": True}),
    "dora's vector": Case(config={"use_dora": True}, extra={
        f"{LAYER_0}self_attn.q_proj.lora_magnitude_vector": (HIDDEN,)}),
    "bias all": Case(config={"bias": "all"}),
    "lora_bias": Case(config={"lora_bias": True}),
    "bias of lora_B": Case(extra={f"{LAYER_0}self_attn.q_proj.lora_B.bias": (HIDDEN,)}),
    "norm saved whole": Case(config={"modules_to_save": ["norm"]},
                             extra={f"{PREFIX}model.norm.weight": (HIDDEN,)}),
    "modules_to_save empty": Case(config={"modules_to_save": []}),
    "norm in the file alone": Case(extra={f"{PREFIX}model.norm.weight": (HIDDEN,)}),
    "layer norm": Case(extra={f"{LAYER_0}input_layernorm.weight": (HIDDEN,)}),
    "head whole": Case(extra={f"{PREFIX}lm_head.weight": (VOCAB, HIDDEN)}),
    "base's head": Case(extra={f"{PREFIX}lm_head.base_layer.weight": (VOCAB, HIDDEN)}),
    "embedding": Case(config={"target_modules": [*NAMES, "embed_tokens"]},
                      extra={f"{EMBEDDING}A": (8, VOCAB), f"{EMBEDDING}B": (HIDDEN, 8)}),
    "embedding of 90 tokens": Case(config={"target_modules": [*NAMES, "embed_tokens"]},
                                   extra={f"{EMBEDDING}A": (8, 90), f"{EMBEDDING}B": (HIDDEN, 8)}),
    "embedding not a target": Case(extra={f"{EMBEDDING}A": (8, VOCAB),
                                          f"{EMBEDDING}B": (HIDDEN, 8)}),
    "no q_proj": Case(drop=("self_attn.q_proj",)),
    "no k_proj": Case(drop=("self_attn.k_proj",)),
    "no v_proj": Case(drop=("self_attn.v_proj",)),
    "no gate_proj": Case(drop=("mlp.gate_proj",)),
    "no up_proj": Case(drop=("mlp.up_proj",)),
    "no q_proj in one layer": Case(drop=("model.layers.1.self_attn.q_proj",)),
    "no k_proj in one layer": Case(drop=("model.layers.1.self_attn.k_proj",)),
    "one layer not adapted": Case(drop=tuple(f"model.layers.1.{m}" for m in SHAPES)),
    "one lora_B missing": Case(drop=(f"{LAYER_0}mlp.down_proj.lora_B.weight",)),
    "model twice in names": Case(rename=lambda key: key.replace(PREFIX, f"{PREFIX}model.")),
    "no prefix": Case(rename=lambda key: key.replace(PREFIX, "")),
    "names of the inner model": Case(rename=lambda key: key.replace("model.model.", "model.")),
    "adapter's name in names": Case(rename=_factor_names),
    "targets as a pattern": Case(config={"target_modules": ".*_proj"}),
    "targets all-linear": Case(config={"target_modules": "all-linear"}),
    "targets in full": Case(config={"target_modules": [f"model.layers.{i}.{m}" for i in range(2)
                                                       for m in SHAPES]}),
    "targets lack down_proj": Case(config={"target_modules": [n for n in NAMES
                                                              if n != "down_proj"]}),
    "a module of another model": Case(extra={f"{LAYER_0}mlp.router.lora_A.weight": (8, HIDDEN),
                                             f"{LAYER_0}mlp.router.lora_B.weight": (4, 8)}),
    "pissa": Case(config={"init_lora_weights": "pissa"}),
    "gaussian": Case(config={"init_lora_weights": "gaussian"}),
    "layer replication": Case(config={"layer_replication": [[0, 2]]}),
    "activated": Case(config={"alora_invocation_tokens": [1]}),
    "added token": Case(added_tokens={"<long>": VOCAB}),
    "added token of the base": Case(added_tokens={"</s>": 2}),
}
# case -> verdict of vLLM 0.11.0, vLLM 0.33.0, SGLang 0.5.23
VERDICTS: dict[str, tuple[str, str, str]] = {
    "plain": ("ok", "ok", "ok"),
    "bf16": ("ok", "ok", "ok"),
    "rank 12": ("ok", "ok", "ok"),
    "rank 600": ("refuses", "refuses", "ok"),
    "ranks differ between projections": ("ok", "ok", "refuses"),
    "q below k": ("ok", "ok", "refuses"),
    "ranks of 0.95 energy": ("ok", "ok", "refuses"),
    "alpha twice r": ("ok", "ok", "ok"),
    "rslora": ("ok", "ok", "wrong"),
    "alpha_pattern scales o_proj": ("wrong", "ok", "wrong"),
    "dora": ("refuses", "refuses", "refuses"),
    "dora's vector": ("refuses", "refuses", "refuses"),
    "bias all": ("refuses", "refuses", "ok"),
    "lora_bias": ("ok", "refuses", "ok"),
    "bias of lora_B": ("wrong", "refuses", "refuses"),
    "norm saved whole": ("refuses", "refuses", "wrong"),
    "modules_to_save empty": ("ok", "ok", "ok"),
    "norm in the file alone": ("refuses", "refuses", "wrong"),
    "layer norm": ("refuses", "refuses", "refuses"),
    "head whole": ("refuses", "refuses", "wrong"),
    "base's head": ("refuses", "ok", "ok"),
    "embedding": ("ok", "ok", "ok"),
    "embedding of 90 tokens": ("ok", "refuses", "refuses"),
    "embedding not a target": ("ok", "ok", "wrong"),
    "no q_proj": ("ok", "ok", "refuses"),
    "no k_proj": ("ok", "ok", "ok"),
    "no v_proj": ("ok", "ok", "refuses"),
    "no gate_proj": ("ok", "ok", "refuses"),
    "no up_proj": ("ok", "ok", "ok"),
    "no q_proj in one layer": ("ok", "ok", "refuses"),
    "no k_proj in one layer": ("ok", "ok", "ok"),
    "one layer not adapted": ("ok", "ok", "ok"),
    "one lora_B missing": ("refuses", "refuses", "refuses"),
    "model twice in names": ("wrong", "wrong", "ok"),
    "no prefix": ("ok", "ok", "ok"),
    "names of the inner model": ("wrong", "wrong", "ok"),
    "adapter's name in names": ("refuses", "refuses", "ok"),
    "targets as a pattern": ("ok", "ok", "refuses"),
    "targets all-linear": ("ok", "ok", "ok"),
    "targets in full": ("ok", "ok", "ok"),
    "targets lack down_proj": ("ok", "ok", "refuses"),
    "a module of another model": ("refuses", "refuses", "refuses"),
    "pissa": ("wrong", "refuses", "wrong"),
    "gaussian": ("ok", "ok", "ok"),
    "layer replication": ("wrong", "refuses", "wrong"),
    "activated": ("wrong", "refuses", "wrong"),
    "added token": ("ok", "ok", "refuses"),
    "added token of the base": ("ok", "ok", "ok"),
}
