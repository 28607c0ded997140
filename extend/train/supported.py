"""What a model may ask for that training would leave out, or not compute twice alike."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from extend.errors import CompatibilityError

# Config keys of models whose logits are not simply hidden @ head.T.
_LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
# Words in the keys of what is drawn at random while training, and of heads that are not trained.
_RANDOM, _OTHER_HEADS = ("dropout", "pdrop", "layerdrop", "jitter"), ("classifier", "summary")
_ATTENTION = ("full_attention", "sliding_attention")


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Check what a config says of the output head, of random numbers and of the loss.

    Args:
        config: keys and values, those left to their defaults too.

    Raises:
        CompatibilityError: an output head that the chunked loss does not compute, dropout or
            noise, or an auxiliary loss.
    """
    for key in _LOGIT_KEYS:
        if config.get(key) not in (None, 1, 1.0):
            raise CompatibilityError(f"{where}: {key} is {config[key]}; training supports models "
                                     "with a plain output head only")
    # Layers run again for their backward, on other ranks and in tiles: each would draw anew.
    noise = [f"{key} {value}" for key, value in config.items() if value
             and any(word in key for word in _RANDOM) and not key.startswith(_OTHER_HEADS)]
    if noise:
        raise CompatibilityError(f"{where}: asks for {', '.join(noise)}; training draws nothing at "
                                 "random inside a model, so write 0 for it in the config")
    if config.get("output_router_logits"):
        raise CompatibilityError(f"{where}: output_router_logits is true, but the auxiliary loss "
                                 "of routers is not part of this training's loss; write false in "
                                 "the config to train without")


def check_layers(model: PreTrainedModel) -> None:
    """Check that tokens meet in attention alone, which is what rings and document masks know.

    Raises:
        CompatibilityError: layers of another kind, such as recurrent ones, or none to be found; or
            an output head with a bias.
    """
    name, decoder = type(model).__name__, model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise CompatibilityError(f"{name}: its decoder has no 'layers'; training supports models "
                                 "that are built as transformers' Llama is")
    kinds = getattr(model.config, "layer_types", None) or ()
    others = sorted({kind for kind in kinds if kind not in _ATTENTION})
    convolution = next((path for path, module in decoder.named_modules()
                        if isinstance(module, nn.Conv1d)), None)
    if others or convolution:
        raise CompatibilityError(
            f"{name}: tokens meet outside of attention, in "
            f"{f'layers of type {others[0]!r}' if others else convolution}, where neither a ring "
            "of processes nor the masks of documents reach; training supports models with full or "
            "sliding-window attention in every layer")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise CompatibilityError(f"{name}: the output head has a bias; training supports models "
                                 "without only")
