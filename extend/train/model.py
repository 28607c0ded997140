"""The model of a run: weights, ring attention, loss."""

import logging

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from extend.checkpoint import Checkpoint
from extend.errors import CompatibilityError
from extend.loading import read_hf_config
from extend.model_config import ModelConfig, RopeSpec
from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train.loss import Teacher, chunked_loss
from extend.train.low_bits import use_float8
from extend.train.supported import check_config, check_layers
from extend.train.trained import choose_trained, init_adapters
from extend.train.vocabulary import split_head
from extend.train.weights import (
    fill_weights,
    is_same,
    place_module,
    replace_parameter,
    shared_names,
)
from extend.train_options import TrainOptions

logger = logging.getLogger(__name__)


class CausalLoss(nn.Module):
    """A causal LM and its loss in one module, so that sharded head and embeddings are gathered.

    With no labels it is a teacher's: what the model makes of tokens, for another one's loss.
    """

    def __init__(self, model: PreTrainedModel, chunk: int, *, compiled: bool = False):
        super().__init__()
        self.model, self.chunk, self.compiled = model, chunk, compiled

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None,
                weights: Tensor | None, ring: RingSettings | None,
                teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
        """Loss fp32 [] and every token's own loss fp32 [r * s], for inputs [r, s].

        Without labels the two parts of a `Teacher`.
        """
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, ring=ring,
        ).last_hidden_state
        head, vocabulary = split_head(self.model.get_output_embeddings().weight)
        if labels is None or weights is None:
            return hidden.flatten(0, 1), head
        return chunked_loss(hidden.flatten(0, 1), head, labels.flatten(), weights.flatten(),
                            chunk=self.chunk, vocabulary=vocabulary, compiled=self.compiled,
                            teacher=teacher)


def build_model(options: TrainOptions, config: ModelConfig) -> PreTrainedModel:
    """The model with the ring as attention, and what is trained of it chosen, before any weights.

    Parameters are on the meta device; buffers have their values. `place_module` and `fill_weights`
    give it weights once it is sharded.

    Raises:
        CompatibilityError: a model that asks for what training does not compute, or that cannot be
            made without its weights.
        RecipeError: an expression in `trainable` or `trained_beside` that matches nothing or is
            none.
    """
    check_config(str(config.path), read_hf_config(options.model).to_dict())
    model = _without_weights(options, config)
    check_layers(model)
    model.config.use_cache = False
    use_float8(model, options)
    choose_trained(model, options)
    return model.train()


def _without_weights(options: TrainOptions, config: ModelConfig) -> PreTrainedModel:
    """What `from_pretrained` makes, but with parameters on the meta device."""
    dtype = getattr(torch, options.weight_dtype)
    name = register_ring_attention()
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                read_hf_config(options.model), dtype=dtype, attn_implementation=name)
    except KeyError as error:
        if error.args != (name,):
            raise
        raise CompatibilityError(f"{config.path}: {config.raw['model_type']!r} models choose among "
                                 "attentions of their own; training supports models that take "
                                 "transformers' attention interface") from None
    model.tie_weights()  # each parameter was moved alone
    _untie_what_differs(model, Checkpoint(options.model), dtype)
    strange = [name for name, p in model.named_parameters() if not p.is_meta or p.dtype != dtype]
    strange += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if dtype != torch.float32:
        strange += [name for name, _ in model.named_parameters() if any(k in name for k in kept)]
    if strange:
        raise CompatibilityError(f"{config.path}: {strange[0]} of {type(model).__name__} cannot be "
                                 f"made in {options.weight_dtype} before it is read; such models "
                                 "cannot be trained yet")
    return model


def _untie_what_differs(model: PreTrainedModel, source: Checkpoint, dtype: torch.dtype) -> None:
    """As transformers does: what the file holds twice, with different values, is not tied."""
    for names in shared_names(model):
        first, *others = [name for name in names if name in source.infos] or [""]
        for name in others:
            if not is_same(source.stored(first), source.stored(name), dtype):
                logger.warning("%s: %s and %s should be tied, but differ in the file; they are "
                               "trained as two", source.directory, first, name)
                twin = torch.empty_like(model.get_parameter(name))
                replace_parameter(model, name, nn.Parameter(twin))


def load_model(options: TrainOptions, config: ModelConfig) -> PreTrainedModel:
    """The whole model in this process, on the CPU and with its weights; see `build_model`.

    Raises:
        CompatibilityError, RecipeError, CheckpointError: as `build_model` and `fill_weights`.
    """
    model = build_model(options, config)
    place_module(model, torch.device("cpu"))
    fill_weights(model, Checkpoint(options.model))
    init_adapters(model, options.seed)
    return model


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
