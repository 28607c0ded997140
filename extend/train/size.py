"""How much a model computes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from extend.model_config import ModelConfig


@dataclass(frozen=True)
class ModelSize:
    """What the speed of a step is measured against.

    Attributes:
        num_matrix: parameters that multiply every token (embedding lookup left out).
        num_trained: those of them that also need a weight gradient.
        attention_width: heads x head_dim of one layer.
        windows: of every layer, tokens that a query sees; None: all before it.
    """

    num_matrix: int
    num_trained: int
    attention_width: int
    windows: tuple[int | None, ...]

    def squares(self, documents: Iterable[int]) -> int:
        """Twice the (query, key) pairs of documents of these lengths, summed over the layers.

        A causal triangle over n tokens is half of n squared; a window cuts off a smaller triangle.
        """
        layers = Counter(self.windows)
        return sum(count * (n * n - (0 if window is None else max(n - window, 0) ** 2))
                   for n in documents for window, count in layers.items())

    def flops(self, tokens: int, squares: int) -> float:
        """FLOPs to train on `tokens` whose attention has `squares`; recompute not counted."""
        linear = (4 * self.num_matrix + 2 * self.num_trained) * tokens
        return linear + 6 * self.attention_width * squares


def model_size(model: PreTrainedModel, config: ModelConfig) -> ModelSize:
    """Count before sharding. A tied head counts once: it multiplies, the lookup does not."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    used = [p for p in model.parameters() if p.ndim > 1 and (tied or p is not embeddings)]
    return ModelSize(sum(p.numel() for p in used), sum(p.numel() for p in used if p.requires_grad),
                     config.num_heads * config.head_dim, layer_windows(model))


def layer_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Tokens that a query of each layer sees, or None for all, as transformers read the config."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
