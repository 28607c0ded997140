"""The model of a run: weights, ring attention, loss."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from extend.errors import CompatibilityError
from extend.model_config import ModelConfig, RopeSpec
from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train.loss import chunked_loss
from extend.train.supported import check_config, check_layers
from extend.train.trained import choose_trained
from extend.train_options import TrainOptions


class CausalLoss(nn.Module):
    """A causal LM and its loss in one module, so that sharded head and embeddings are gathered."""

    def __init__(self, model: PreTrainedModel, chunk: int):
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor,
                ring: RingSettings | None) -> tuple[Tensor, Tensor]:
        """Loss fp32 [] and every token's own loss fp32 [r * s], for inputs [r, s]."""
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, ring=ring,
        ).last_hidden_state
        head = self.model.get_output_embeddings().weight
        return chunked_loss(hidden.flatten(0, 1), head, labels.flatten(), weights.flatten(),
                            chunk=self.chunk)


def load_model(options: TrainOptions, config: ModelConfig) -> PreTrainedModel:
    """Load the weights on the CPU with the ring as attention, and choose what is trained.

    Raises:
        CompatibilityError: a model that asks for what training does not compute.
        RecipeError: an expression in `trainable` that matches nothing or is none.
    """
    check_config(str(config.path), AutoConfig.from_pretrained(options.model).to_dict())
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.weight_dtype),
        attn_implementation=register_ring_attention())
    check_layers(model)
    model.config.use_cache = False
    choose_trained(model, options)
    return model.train()


def check_rope(rope: RopeSpec, cp: int) -> None:
    """Raise CompatibilityError for a RoPE that has no frequencies of its own to train.

    Args:
        cp: processes that share a row; each sees its own positions only.
    """
    if rope.rope_type == "dynamic":
        raise CompatibilityError("rope_type 'dynamic' has other frequencies at every length, so "
                                 "there are none to train; rescale the model first, with another "
                                 f"method and --from {rope.original_len}")
    if rope.depends_on_length and cp > 1:
        raise CompatibilityError(f"rope_type {rope.rope_type!r} depends on the positions that a "
                                 f"process sees, which differ over a ring of {cp}; choose another "
                                 "method, or as many batch_rows as processes")
