"""The model of a run: weights, ring attention, adapters, sharding, loss."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from extend.errors import CompatibilityError, RecipeError, TrainingError
from extend.model_config import ModelConfig, RopeSpec
from extend.options import TrainOptions
from extend.ring.hf_attention import RingSettings, register_ring_attention
from extend.train.loss import chunked_loss
from extend.train.mesh import Processes

ADAPTER = "default"  # PEFT's name for the adapter

# Config keys of models whose logits are not simply hidden @ head.T.
_LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


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
        CompatibilityError: an output head that the chunked loss does not compute.
        RecipeError: an expression in `trainable` that matches nothing or is none.
    """
    for key in _LOGIT_KEYS:
        if config.raw.get(key) not in (None, 1, 1.0):
            raise CompatibilityError(f"{config.path}: {key} is {config.raw[key]}; training "
                                     "supports models with a plain output head only")
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.weight_dtype),
        attn_implementation=register_ring_attention())
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise CompatibilityError(f"{config.path}: the output head has a bias; training supports "
                                 "models without only")
    model.config.use_cache = False
    if options.mode == "lora":
        _add_adapters(model, options)
    else:
        _freeze_unmatched(model, options.trainable)
    return model.train()


def _matching(names: list[str], expressions: list[str]) -> list[str]:
    """The names that some expression matches; all when there is none.

    Raises:
        RecipeError: an expression that is not valid or matches no name.
    """
    chosen: set[str] = set()
    for expression in expressions:
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise RecipeError(f"trainable: {expression!r} is no regular expression "
                              f"({error})") from None
        if not found:
            raise RecipeError(f"trainable: {expression!r} matches no parameter; names are like "
                              f"{names[0]}, {names[len(names) // 2]}, {names[-1]}")
        chosen.update(found)
    return [name for name in names if name in chosen or not expressions]


def _freeze_unmatched(model: nn.Module, expressions: list[str]) -> None:
    trained = set(_matching([name for name, _ in model.named_parameters()], expressions))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _add_adapters(model: PreTrainedModel, options: TrainOptions) -> None:
    """Put LoRA on the decoder's linear layers; `trainable` is matched with their weights' names."""
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and module is not head]
    targets = [name.removesuffix(".weight") for name in _matching(names, options.trainable)]
    torch.manual_seed(options.seed)  # all processes start from the same lora_A
    lora = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, lora_dropout=0.0,
                      target_modules=targets)
    inject_adapter_in_model(lora, model, adapter_name=ADAPTER)
    # Adapters in the dtype of the weights: sharding wants one dtype for all that is trained.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, options.weight_dtype))


def shard_model(module: CausalLoss, processes: Processes) -> CausalLoss:
    """Move to the device, and shard parameters, gradients and optimizer over all processes.

    Gradients are summed, not averaged: each token's weight already counts it in the whole step.
    """
    if processes.mesh is None:
        return _place(module, processes.device)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded = [*module.model.get_decoder().layers, module]
    for part in sharded:
        fully_shard(part, mesh=processes.mesh, mp_policy=policy)
    for part in sharded:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return _place(module, processes.device)


def _place(module: CausalLoss, device: torch.device) -> CausalLoss:
    """On the device; a module without values yet gets memory for them there."""
    if any(p.is_meta for p in module.parameters()):
        return module.to_empty(device=device)
    return module.to(device)


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


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained.

    Raises:
        TrainingError: nothing is.
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError("no parameter is trained; check mode and trainable")
    return found
