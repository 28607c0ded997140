"""How many parameters a model has, and how wide its layers are, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extend.model_config import ModelConfig

# What transformers' classes do where config.json has no key for it (5.17 to 5.24).
_QKV_BIAS = frozenset({"qwen2", "qwen2_moe"})  # whatever attention_bias says
_NO_OUT_BIAS = frozenset({"glm", "glm4", "seed_oss"})
_ALL_BIAS = frozenset({"starcoder2", "phi", "phimoe"})
_HEAD_NORM = frozenset({"qwen3", "qwen3_moe", "gemma3_text", "exaone4", "hunyuan_v1_dense"})
_WIDE_NORM = frozenset({"olmo2", "olmo3", "flex_olmo", "olmoe"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3_text", "glm4"})
_ONE_NORM = frozenset({"cohere", "cohere2"})
_PLAIN_MLP = frozenset({"starcoder2", "phi", "nemotron", "gpt_neox"})
_NORM_BIAS = frozenset({"starcoder2", "phi", "phimoe", "nemotron"})
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TIED = frozenset({"gemma", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Widths and counts of a decoder.

    Attributes:
        hidden: the model's width.
        q_width, kv_width: channels of all query heads, and of all key heads.
        inner: width of an MLP; of one expert where there are experts.
        num_matrices: of an MLP: 3 where it is gated.
        num_norms: of the model's width, in a layer.
        head_norm: "head": queries and keys are normed head by head; "wide": all heads as one.
        attention_biases, mlp_biases: values of the biases of a layer.
        norm_values: of all norms of a layer.
        num_experts, experts_per_token: 0 and 1 where there are none.
        shared_inner: width of an expert that every token goes through.
        num_sparse: layers with experts; the others have one MLP of width `dense_inner`.
        windows: of every layer, tokens that a query sees; None: all before it.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    num_matrices: int = 3
    num_norms: int = 2
    head_norm: str | None = None
    attention_biases: int = 0
    mlp_biases: int = 0
    norm_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 1
    shared_inner: int = 0
    num_sparse: int = 0
    dense_inner: int = 0
    windows: tuple[int | None, ...] = ()

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def attention_matrix(self) -> int:
        """Parameters of the four projections of a layer."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width)

    @property
    def norm_values(self) -> int:
        wide = self.num_norms * self.hidden * (1 + self.norm_bias)
        of_heads = {"head": 2 * self.head_dim, "wide": self.q_width + self.kv_width, None: 0}
        return wide + of_heads[self.head_norm]

    @property
    def mlp_matrix(self) -> int:
        """Parameters of the MLP of a layer, of all experts and their router where it has them.

        Layers may differ: this is their mean.
        """
        dense = self.num_matrices * self.hidden * self.dense_inner
        if not self.num_experts:
            return dense
        return (self.num_sparse * self._sparse_matrix(self.num_experts)
                + (self.num_layers - self.num_sparse) * dense) // self.num_layers

    @property
    def active_mlp_matrix(self) -> int:
        """Parameters of the MLP of a layer that one token multiplies with, in the mean."""
        dense = self.num_matrices * self.hidden * self.dense_inner
        if not self.num_experts:
            return dense
        return (self.num_sparse * self._sparse_matrix(self.experts_per_token)
                + (self.num_layers - self.num_sparse) * dense) // self.num_layers

    def _sparse_matrix(self, experts: int) -> int:
        shared = self.num_matrices * self.shared_inner + (1 if self.shared_inner else 0)
        return self.hidden * (experts * self.num_matrices * self.inner + self.num_experts + shared)

    @property
    def active_inner(self) -> float:
        """Inner values of a token in a layer's MLP."""
        sparse = self.experts_per_token * self.inner + self.shared_inner
        share = self.num_sparse / self.num_layers
        return share * sparse + (1 - share) * self.dense_inner

    @property
    def layer_parameters(self) -> int:
        """Of one layer; their mean where layers differ."""
        return (self.attention_matrix + self.mlp_matrix + self.attention_biases + self.mlp_biases
                + self.norm_values)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of an output head beside it."""
        return self.vocab * self.hidden

    @property
    def root_parameters(self) -> int:
        """All that is not in a layer: embedding, output head, last norm."""
        return self.embedding * (2 - self.tied) + self.hidden * (1 + self.norm_bias)

    @property
    def parameters(self) -> int:
        return self.num_layers * self.layer_parameters + self.root_parameters

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token multiplies with: the embedding's lookup left out."""
        return (self.num_layers * (self.attention_matrix + self.active_mlp_matrix)
                + self.embedding)

    def squares(self, length: int) -> int:
        """Twice the (query, key) pairs of a causal row, summed over the layers."""
        return sum(length**2 - (0 if window is None else max(length - window, 0) ** 2)
                   for window in self.windows or (None,) * self.num_layers)


def model_shape(config: ModelConfig) -> ModelShape:
    """Read a config; a key that transformers assumes is filled in by family."""
    raw, family = config.raw, str(config.raw.get("model_type"))
    experts, num_sparse = _experts(raw, config.num_layers)
    inner = config.intermediate_size
    if experts and raw.get("moe_intermediate_size"):
        inner = int(raw["moe_intermediate_size"])
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    attention_bias = _attention_bias(raw, family, config.hidden_size, q_width, kv_width)
    matrices = 2 if family in _PLAIN_MLP else 3
    with_bias = bool(raw.get("mlp_bias") or raw.get("use_bias", family in _ALL_BIAS))
    mlp_biases = (matrices - 1) * config.intermediate_size + config.hidden_size
    return ModelShape(
        hidden=config.hidden_size, num_layers=config.num_layers, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, inner=inner,
        vocab=config.vocab_size,
        tied=bool(raw.get("tie_word_embeddings", family in _TIED)),
        num_matrices=matrices,
        num_norms=4 if family in _FOUR_NORMS else 1 if family in _ONE_NORM else 2,
        head_norm=_head_norm(raw, family), attention_biases=attention_bias,
        mlp_biases=mlp_biases if with_bias and not experts else 0,
        norm_bias=family in _NORM_BIAS, num_experts=experts,
        experts_per_token=int(raw.get("num_experts_per_tok") or 1) if experts else 1,
        shared_inner=int(raw.get("shared_expert_intermediate_size") or 0) if experts else 0,
        num_sparse=num_sparse, dense_inner=config.intermediate_size, windows=_windows(config))


def _experts(raw: Mapping[str, Any], num_layers: int) -> tuple[int, int]:
    """Experts of a sparse layer, and how many layers are sparse."""
    experts = next((int(raw[key]) for key in _EXPERTS if raw.get(key)), 0)
    if not experts:
        return 0, 0
    step, dense = int(raw.get("decoder_sparse_step") or 1), set(raw.get("mlp_only_layers") or ())
    sparse = [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]
    return experts, len(sparse)


def _attention_bias(raw: Mapping[str, Any], family: str, hidden: int, q: int, kv: int) -> int:
    if family in _QKV_BIAS:
        return q + 2 * kv
    if raw.get("attention_bias") or raw.get("use_bias", family in _ALL_BIAS):
        return q + 2 * kv + (0 if family in _NO_OUT_BIAS else hidden)
    return 0


def _head_norm(raw: Mapping[str, Any], family: str) -> str | None:
    if family in _HEAD_NORM or raw.get("use_qk_norm"):
        return "head"
    return "wide" if family in _WIDE_NORM else None


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Of every layer, as `extend.train.size.layer_windows` reads them from transformers' config."""
    window, kinds = config.sliding_window, config.raw.get("layer_types")
    if window is None:
        return (None,) * config.num_layers
    if not kinds:
        return (window,) * config.num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
