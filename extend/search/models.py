"""The models of a search: the one to extend, and siblings of it, given or made up."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from extend.errors import CheckpointError, CompatibilityError
from extend.model_config import ModelConfig, RopeSpec, read_config
from extend.ring.hf_attention import register_ring_attention
from extend.rope.live import set_rope
from extend.tokenizer import load_tokenizer

_LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")
_SHAPE_KEYS = ("architecture", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
               "vocab_size")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_DELTA_RANK = 8  # like a LoRA's: a delta of full rank and the same norm changes hardly anything


@dataclass(frozen=True, slots=True)
class SearchedModel:
    """A model whose RoPE is swapped.

    Attributes:
        own: its own RoPE.
    """

    model: PreTrainedModel
    config: ModelConfig
    own: RopeSpec

    def use(self, rope: RopeSpec, length: int) -> None:
        """Give it the RoPE that a config with `rope`, written for `length` tokens, stands for."""
        log = logging.getLogger("transformers.modeling_rope_utils")
        level = log.level
        log.setLevel(logging.ERROR)  # of every candidate it would name the keys for other engines
        try:
            set_rope(self.model, self.config.raw, rope, length, self.model.device)
        finally:
            log.setLevel(level)


def choose_device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def load_model(directory: Path, device: torch.device) -> SearchedModel:
    """Load for prefill: bfloat16 on a GPU, fp32 elsewhere.

    Raises:
        CheckpointError: damaged or missing weights.
        CompatibilityError: an architecture that transformers does not know, or logits that are not
            simply the output head's.
    """
    config = read_config(directory)
    for key in _LOGIT_KEYS:
        if config.raw.get(key) not in (None, 1, 1.0):
            raise CompatibilityError(f"{config.path}: {key} is {config.raw[key]}; the search "
                                     "supports models with a plain output head only")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, output_loading_info=True,
            trust_remote_code=False, use_safetensors=True,
            attn_implementation=register_ring_attention())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CompatibilityError(f"{directory}: transformers cannot load it ({error})") from error
    if info.get("missing_keys"):
        raise CheckpointError(f"{directory}: {len(info['missing_keys'])} weights are missing, the "
                              f"first {min(map(str, info['missing_keys']))!r}")
    return SearchedModel(model.to(device).eval(), config, config.rope)


def check_sibling(base: ModelConfig, sibling: ModelConfig) -> None:
    """Raise CompatibilityError unless `sibling` has the shape, RoPE and window of `base`."""
    for key in _SHAPE_KEYS:
        first, second = getattr(base, key), getattr(sibling, key)
        if first != second:
            raise CompatibilityError(f"{sibling.path}: {key} is {second} but {base.path} has "
                                     f"{first}; give fine-tunes of the model itself")
    for what, first, second in (
            ("RoPE", _rope(base.rope), _rope(sibling.rope)),
            ("RoPE of other layers",
             *({kind: _rope(rope) for kind, rope in config.rope_by_layer_type.items()}
               for config in (base, sibling))),
            ("sliding window", base.sliding_window, sibling.sliding_window)):
        if first != second:
            raise CompatibilityError(f"{sibling.path}: its {what} is {second} but that of "
                                     f"{base.path} is {first}; give fine-tunes that were not "
                                     "extended")


def _rope(spec: RopeSpec) -> dict[str, Any]:
    """What decides the frequencies; a sibling may give another length."""
    return {"rope_theta": spec.rope_theta, "rotary_dim": spec.rotary_dim, **spec.scaling}


def check_tokenizer(tokenizer: Any, base: Path, sibling: Path, sample: str) -> None:
    """Check that a sibling reads a text as the base does; one without tokenizer files may.

    Raises:
        CheckpointError: the sibling's tokenizer cannot be read.
        CompatibilityError: it gives other ids for `sample`.
    """
    if not any((sibling / name).is_file() for name in _TOKENIZER_FILES):
        return
    first, second = (list(t(sample, verbose=False)["input_ids"])
                     for t in (tokenizer, load_tokenizer(sibling)))
    if first == second:
        return
    place = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b),
                 min(len(first), len(second)))
    raise CompatibilityError(
        f"{sibling}: its tokenizer differs from that of {base}: of {len(sample)} characters of "
        f"text it makes {second[place:place + 3]} where the other makes {first[place:place + 3]} "
        f"(token {place}); give fine-tunes with the model's own tokenizer")


def make_siblings(base: SearchedModel, names: Sequence[str], drift: float,
                  seed: int) -> dict[str, SearchedModel]:
    """Copies of the base with small random deltas on the linear layers of its blocks.

    Args:
        drift: Frobenius norm of a matrix's delta over that of the matrix.
    """
    made = {}
    for number, name in enumerate(names):
        model = copy.deepcopy(base.model)
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        _drift(model, drift, generator)
        made[name] = SearchedModel(model, base.config, base.own)
    return made


@torch.no_grad()
def _drift(model: PreTrainedModel, drift: float, generator: torch.Generator) -> None:
    for module in model.get_decoder().layers.modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        rank = min(_DELTA_RANK, rows, columns)
        # Drawn on the CPU, so that every device sees the same.
        delta = (torch.randn(rows, rank, generator=generator)
                 @ torch.randn(rank, columns, generator=generator)).to(module.weight.device)
        weight = module.weight.float()
        delta *= drift * weight.norm() / delta.norm()
        module.weight.copy_(weight + delta)
