"""SGLang's loader: LoRAConfig, LoRAAdapter, and the copy into the buffers of its memory pool."""

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scripts.serving_loaders import stubs

_STACKED = {"qkv_proj": ("self_attn", ("q_proj", "k_proj", "v_proj")),
            "o_proj": ("self_attn", ("o_proj",)), "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
            "down_proj": ("mlp", ("down_proj",))}


class _Layer(torch.nn.Module):
    def slice_lora_a_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def slice_lora_b_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Loader:
    """The loader of a Llama without tensor parallelism, from a wheel unpacked into `root`.

    Args:
        config: of the base, a transformers config.
    """

    def __init__(self, root: Path, config: Any):
        real = ("lora_config", "lora", "utils", "mem_pool")
        stubs.install("sglang", root, [f"sglang.srt.lora.{name}" for name in real])
        importlib.import_module("sglang.srt.layers.utils").get_layer_id = _layer_id
        layers = importlib.import_module("sglang.srt.lora.layers")
        layers.BaseLayerWithLoRA, layers.FusedMoEWithLoRA = _Layer, type("FusedMoEWithLoRA", (), {})
        environ = importlib.import_module("sglang.srt.environ")
        environ.envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get = lambda: False
        self.lora = importlib.import_module("sglang.srt.lora.lora")
        self.pool = importlib.import_module("sglang.srt.lora.mem_pool").LoRAMemoryPool
        self.utils = importlib.import_module("sglang.srt.lora.utils")
        self.config = config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        dim, inner = config.hidden_size // heads, config.intermediate_size
        self.sizes = {"qkv_proj": (config.hidden_size, (heads * dim, kv * dim, kv * dim)),
                      "o_proj": (heads * dim, (config.hidden_size,)),
                      "gate_up_proj": (config.hidden_size, (inner, inner)),
                      "down_proj": (inner, (config.hidden_size,))}

    def load(self, directory: Path, vocab_size: int) -> dict[str, torch.Tensor]:
        """module -> scaling * B A as the kernels read it from the buffers.

        Raises:
            Exception: whatever the loader raises, and what `validate_new_adapter` would.
        """
        config = self.lora.LoRAConfig(str(directory), base_vocab_size=vocab_size)
        if config.lora_added_tokens_size > 0 or config.use_dora:
            raise ValueError("validate_new_adapter refuses added tokens and DoRA")
        adapter = self.lora.LoRAAdapter("one", config, self.config, None, None)
        adapter.initialize_weights_from_tensors(load_file(directory /
                                                          "adapter_model.safetensors"))
        targets = self.utils.get_normalized_target_modules(config.target_modules)
        pool = self._new_pool(set(_STACKED) if "all" in targets else targets, config.r)
        if not pool.can_support(config):
            raise ValueError("the memory pool does not support it")
        layers = range(self.config.num_hidden_layers)
        modules = [{f"model.layers.{i}.{_STACKED[t][0]}.{t}": _Layer() for t in pool.A_buffer}
                   for i in layers]
        pool.load_lora_weight_to_buffer("one", 0, adapter, modules, None, None)
        found = {"model.embed_tokens": adapter.scaling * pool.embedding_B_buffer["embed_tokens"][0]
                 @ pool.embedding_A_buffer["embed_tokens"][0]}
        for target in pool.A_buffer:
            for i in layers:
                found |= self._read(pool, target, i, config.r, adapter.scaling)
        return found

    def _new_pool(self, targets: set[str], rank: int) -> Any:
        pool, size = object.__new__(self.pool), self.config
        unknown = targets - {*_STACKED, "embed_tokens", "lm_head"}
        if unknown:
            raise NotImplementedError(f"get_hidden_dim of {unknown}")
        pool.max_lora_rank, pool.target_modules = rank, targets
        pool.lora_added_tokens_size, pool.strict_loading = 0, False
        pool.num_layer, pool.tp_rank, pool.tp_size = size.num_hidden_layers, 0, 1
        pool.base_model, pool.base_hf_config = None, size
        pool.experts_shared_outer_loras = False
        pool._get_maybe_cached_weight_for_transfer = lambda pinned, key, weight: weight
        stacked = {t: self.utils.get_stacked_multiply(t) for t in targets & set(_STACKED)}
        pool.A_buffer = {t: [torch.zeros(1, rank * c, self.sizes[t][0])
                             for _ in range(pool.num_layer)] for t, c in stacked.items()}
        pool.B_buffer = {t: [torch.zeros(1, sum(self.sizes[t][1]), rank)
                             for _ in range(pool.num_layer)] for t in stacked}
        pool.embedding_A_buffer = {"embed_tokens": torch.zeros(1, rank, size.vocab_size)}
        pool.embedding_B_buffer = {"embed_tokens": torch.zeros(1, size.hidden_size, rank)}
        pool.lm_head_A_buffer, pool.lm_head_B_buffer, pool.new_embeddings_buffer = {}, {}, {}
        return pool

    def _read(self, pool: Any, target: str, layer: int, rank: int,
              scaling: float) -> dict[str, torch.Tensor]:
        """Stacked slice j lies at rows j * r of A, and at its own rows of B."""
        block, names = _STACKED[target]
        lora_a, lora_b = pool.A_buffer[target][layer][0], pool.B_buffer[target][layer][0]
        parts = zip(names, lora_a.split(rank), lora_b.split(self.sizes[target][1]))
        return {f"model.layers.{layer}.{block}.{name}": scaling * b @ a for name, a, b in parts}


def _layer_id(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None
