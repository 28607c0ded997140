"""Which GGUF architectures are imported, and how: config, names, and what a converter changed.

A name or a metadata key that is not known here stops the import: it would change what the model
computes. Each architecture is a line at the bottom.

Source: llama.cpp, convert_hf_to_gguf.py (what is undone here), gguf-py/gguf/constants.py (keys).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from extend.errors import CompatibilityError
from extend.gguf.header import Header
from extend.gguf.rope import FACTORS, YARN_KEYS, rope_parameters, shortest

Config = dict[str, Any]

_KEYS = {"context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
         "attention.head_count", "attention.head_count_kv", "attention.key_length",
         "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
         "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.finetuned", *YARN_KEYS}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
          "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
          "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA = {**_INNER, "post_attention_norm": "post_attention_layernorm",
          "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def _as_stored(name: str, values: np.ndarray, config: Config) -> np.ndarray:
    return values


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one of llama.cpp's architectures becomes a checkpoint.

    Attributes:
        model_type, class_name: of transformers.
        more: config keys beside those that all have.
        names: llama.cpp's name of a layer's part -> transformers'.
        undo: (GGUF name, values, config) -> the values as they were before the conversion.
        whole: parts whose rows `undo` moves, so that it must have them all.
        keys: metadata that `more` reads, beside what all have.
    """

    model_type: str
    class_name: str
    more: Callable[[Header], Config]
    names: Mapping[str, str] = field(default_factory=lambda: _INNER)
    undo: Callable[[str, np.ndarray, Config], np.ndarray] = _as_stored
    whole: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()

    def moves_rows(self, name: str) -> bool:
        """Whether `undo` needs the whole tensor of this GGUF name."""
        return name.split(".")[-2] in self.whole

    def config(self, header: Header) -> Config:
        """The keys of a config.json, with `rope_parameters` as the only spelling of the RoPE.

        Raises:
            CompatibilityError: the file says something that is not understood.
        """
        self._check_keys(header)
        return {**_common(header), "architectures": [self.class_name],
                "model_type": self.model_type, **self.more(header)}

    def _check_keys(self, header: Header) -> None:
        prefix = f"{header.architecture}."
        known = {prefix + key for key in _KEYS | self.keys}
        strange = [key for key in header.keys if key.startswith(prefix) and key not in known
                   and header.get(key)]  # zero experts are none
        if strange:
            raise CompatibilityError(
                f"{header.path}: {', '.join(strange)} would change what the model computes, and is "
                f"not supported for {header.architecture}; import the model from its original "
                "checkpoint")

    def names_of(self, header: Header) -> dict[str, str]:
        """GGUF name -> name in the checkpoint, of every tensor that belongs there.

        Raises:
            CompatibilityError: a tensor that this architecture does not have.
        """
        found = {name: self._name(name) for name in header.tensors if name != FACTORS}
        unknown = [name for name, new in found.items() if new is None]
        if unknown:
            raise CompatibilityError(f"{header.path}: {len(unknown)} tensors are not known for "
                                     f"{header.architecture}, the first {unknown[0]!r}; import the "
                                     "model from its original checkpoint")
        return found

    def _name(self, name: str) -> str | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        layer, part, kind = match.group("layer", "part", "kind")
        new = (_OUTER if layer is None else self.names).get(part)
        if new is None:
            return None
        return f"{new}.{kind}" if layer is None else f"model.layers.{layer}.{new}.{kind}"


def find_architecture(header: Header) -> Architecture:
    """Raises CompatibilityError when it is none of `ARCHITECTURES`."""
    if header.architecture not in ARCHITECTURES:
        raise CompatibilityError(f"{header.path}: its architecture is {header.architecture!r}; "
                                 f"imported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[header.architecture]


def _common(header: Header) -> Config:
    hidden, heads = _whole(header, "embedding_length"), _whole(header, "attention.head_count")
    head_dim = int(header.of_model("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.of_model(key, head_dim) != head_dim:
            raise CompatibilityError(f"{header.path}: {key} is {header.of_model(key)} but heads "
                                     f"have {head_dim} channels; only equal ones are supported")
    tokens = {key: header.get(f"tokenizer.ggml.{name}_token_id")
              for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {
        "attention_dropout": 0.0, "head_dim": head_dim, "hidden_size": hidden,
        "intermediate_size": _whole(header, "feed_forward_length"),
        "max_position_embeddings": _whole(header, "context_length"),
        "num_attention_heads": heads, "num_hidden_layers": _whole(header, "block_count"),
        "num_key_value_heads": int(header.of_model("attention.head_count_kv", heads)),
        "rms_norm_eps": shortest(header.need_of_model("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors, "use_cache": True,
        "vocab_size": int(header.tensors["token_embd.weight"].shape[1])
        if "token_embd.weight" in header.tensors else 0,
        **{f"{key}_token_id": int(token) for key, token in tokens.items() if token is not None}}


def _whole(header: Header, key: str) -> int:
    value = header.need_of_model(key)
    if not isinstance(value, int):
        raise CompatibilityError(f"{header.path}: {header.architecture}.{key} is {value}; only "
                                 "models whose layers are all alike are supported")
    return value


def _llama(header: Header) -> Config:
    return {"attention_bias": "blk.0.attn_q.bias" in header.tensors, "hidden_act": "silu",
            "mlp_bias": "blk.0.ffn_up.bias" in header.tensors, "pretraining_tp": 1}


def _qwen2(header: Header) -> Config:
    return {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}


def _qwen3(header: Header) -> Config:
    return {**_qwen2(header), "attention_bias": "blk.0.attn_q.bias" in header.tensors}


_PATTERN = 6  # of each six layers of Gemma 3 the last has full attention
_LOCAL_THETA = 10000.0
_LAYERS_27B = 62


def _gemma3(header: Header) -> Config:
    """Sliding layers have a RoPE of their own; a converter writes neither it nor the pattern.

    Source: llama.cpp, src/llama-model.cpp, LLM_ARCH_GEMMA3.
    """
    layers, hidden = _whole(header, "block_count"), _whole(header, "embedding_length")
    heads = _whole(header, "attention.head_count")
    full = rope_parameters(header, int(header.need_of_model("attention.key_length")))
    local = float(header.of_model("rope.freq_base_swa", _LOCAL_THETA))
    pattern = int(header.of_model("attention.sliding_window_pattern", _PATTERN))
    return {
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": _whole(
            header, "attention.sliding_window"),
        "query_pre_attn_scalar": hidden // heads if layers == _LAYERS_27B
        else _whole(header, "attention.key_length"),
        "layer_types": ["sliding_attention" if (layer + 1) % pattern else "full_attention"
                        for layer in range(layers)],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_theta": local, "rope_type": "default"}}}


_ROTATED = frozenset({"attn_q", "attn_k"})


def _undo_permutation(name: str, values: np.ndarray, config: Config) -> np.ndarray:
    """Rows of q and k, which llama.cpp keeps with the two channels of a pair side by side."""
    part = name.split(".")[-2]
    if part not in _ROTATED:
        return values
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    apart = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return apart.swapaxes(1, 2).reshape(values.shape)


def _undo_shift(name: str, values: np.ndarray, config: Config) -> np.ndarray:
    """Norms, which llama.cpp multiplies by w where the checkpoint means 1 + w."""
    return values - np.float32(1) if name.endswith("norm.weight") else values


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", class_name="LlamaForCausalLM", more=_llama,
                          undo=_undo_permutation, whole=_ROTATED),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", more=_qwen2),
    "qwen3": Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", more=_qwen3),
    "gemma3": Architecture(
        model_type="gemma3_text", class_name="Gemma3ForCausalLM", more=_gemma3, names=_GEMMA,
        undo=_undo_shift, keys=frozenset({"attention.sliding_window", "rope.freq_base_swa",
                                          "attention.sliding_window_pattern"})),
}
