"""vLLM's loader: PEFTHelper, LoRAModel, and what its packing leaves in the buffers of a layer."""

import importlib
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from scripts.serving_loaders import stubs

_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
             "embed_tokens", "lm_head"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Loader:
    """The loader of a Llama without tensor parallelism, from a wheel unpacked into `root`."""

    def __init__(self, root: Path):
        sys.modules.setdefault("regex", re)
        new = (root / "vllm/lora/lora_model.py").is_file()
        model = "vllm.lora.lora_model" if new else "vllm.lora.models"
        stubs.install("vllm", root, ("vllm.lora.peft_helper", "vllm.lora.lora_weights", model))
        utils = importlib.import_module("vllm.lora.utils")
        names = ("parse_fine_tuned_lora_name", "is_base_embedding_weights",
                 "is_regex_target_modules")
        vars(utils).update(stubs.functions(root / "vllm/lora/utils.py", names,
                                           {**vars(typing), "re": re}))
        importlib.import_module("vllm.utils.torch_utils").PIN_MEMORY = False
        importlib.import_module("vllm.utils").is_pin_memory_available = lambda: False
        if not new:
            importlib.import_module("vllm.utils").LRUCache = _Cache
            importlib.import_module("vllm.model_executor.models").SupportsLoRA = object
        self.model = importlib.import_module(model).LoRAModel
        self.helper = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
        self.packed = importlib.import_module("vllm.lora.lora_weights").PackedLoRALayerWeights

    def load(self, directory: Path, vocab_size: int) -> dict[str, torch.Tensor]:
        """module -> B A as the layer computes it.

        Raises:
            Exception: whatever the loader raises.
        """
        helper = self.helper.from_local_dir(str(directory), 4096)
        limit = _limit(directory)
        helper.validate_legal(SimpleNamespace(max_lora_rank=limit, bias_enabled=False))
        options: dict[str, Any] = {"model_vocab_size": vocab_size}
        if "target_embedding_padding" in inspect.signature(
                self.model.from_local_checkpoint).parameters:
            options = {"target_embedding_padding": vocab_size, "embedding_modules": {
                "embed_tokens": "input_embeddings", "lm_head": "output_embeddings"},
                "embedding_padding_modules": ["lm_head"]}
        found = self.model.from_local_checkpoint(
            str(directory), set(_EXPECTED), peft_helper=helper, lora_model_id=1, device="cpu",
            dtype=torch.float32, **options).loras
        for prefix in sorted({name.rpartition(".")[0] for name in found}):
            for parts in _PACKED.values():
                self._pack(found, [f"{prefix}.{part}" for part in parts])
        for lora in found.values():
            lora.optimize()
        return {name: _placed(lora.lora_a, lora.lora_b, limit) for name, lora in found.items()}

    def _pack(self, found: dict[str, Any], names: list[str]) -> None:
        """As `_create_merged_loras_inplace` does."""
        loras = [found.get(name) for name in names]
        if not any(loras):
            return
        packed = self.packed.pack(loras)
        packed.optimize()
        for name, lora_a, lora_b in zip(names, packed.lora_a, packed.lora_b):
            if lora_a is not None:
                found[name].lora_a, found[name].lora_b = lora_a, lora_b


_K, _V = typing.TypeVar("_K"), typing.TypeVar("_V")


class _Cache(typing.Generic[_K, _V]):
    pass


def _limit(directory: Path) -> int:
    """`--max-lora-rank`: the value of vLLM's list that takes every rank of the config."""
    config = json.loads((directory / "adapter_config.json").read_text())
    rank = max(config["r"], *(config.get("rank_pattern") or {0: 0}).values())
    return next((size for size in _RANKS if size >= rank), _RANKS[-1])


def _placed(lora_a: torch.Tensor, lora_b: torch.Tensor, limit: int) -> torch.Tensor:
    """As `set_lora` copies the factors into zeroed buffers."""
    a, b = torch.zeros(limit, lora_a.shape[1]), torch.zeros(lora_b.shape[0], limit)
    a[:lora_a.shape[0], :lora_a.shape[1]].copy_(lora_a)
    b[:lora_b.shape[0], :lora_b.shape[1]].copy_(lora_b)
    return b @ a
