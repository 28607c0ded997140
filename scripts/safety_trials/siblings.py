"""Fine-tunes of one base, and their deltas."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from extend.evaluate.tasks.task import Prompt
from extend.model_config import ModelConfig, RopeSpec
from extend.rope.live import set_rope

from .scoring import Batch, autocast, make_batch
from .settings import Strength

Weights = Mapping[str, Tensor]
TRAINED = {"all": (".layers.", "model.norm"), "mlp": (".mlp.",)}
"""part -> what the names of trained weights contain; embeddings stay, as tied ones do in merges."""


class Subject:
    """One model in memory whose weights and RoPE are changed in place, again and again.

    Attributes:
        base: its own weights, fp32, by parameter name.
    """

    def __init__(self, config: ModelConfig, path: str, device: torch.device):
        self.config, self.device = config, device
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
        self.model.config.use_cache = False
        self.base = self.weights()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def become(self, *deltas: tuple[float, Weights]) -> None:
        """Base weights plus the weighted deltas."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.base[name])
            for weight, delta in deltas:
                if name in delta:
                    parameter.add_(delta[name], alpha=weight)

    def set_rope(self, spec: RopeSpec, length: int) -> None:
        set_rope(self.model, self.config.raw, spec, length, self.device)

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor]:
        """Present weights minus the base's, where they differ."""
        differences = {name: p - self.base[name] for name, p in self.model.named_parameters()}
        return {name: d for name, d in differences.items() if d.any()}

    def drift(self, delta: Weights) -> float:
        """||delta|| / ||W|| over the matrices of the decoder's layers."""
        names = [name for name, weight in self.base.items()
                 if ".layers." in name and weight.ndim == 2]
        moved = sum(float(delta[n].double().square().sum()) for n in names if n in delta)
        return (moved / sum(float(self.base[n].double().square().sum()) for n in names)) ** 0.5


def draw_batches(prompts: Sequence[Prompt], tokens: int, steps: int, seed: int,
                 device: torch.device) -> list[Batch]:
    """Batches of random examples, about `tokens` without padding; all examples once, then again."""
    rng, order, batches = random.Random(seed), [], []
    mean = sum(len(prompt.ids) for prompt in prompts) / len(prompts)
    size = max(4, round(tokens / mean))
    for _ in range(steps):
        while len(order) < size:
            order += rng.sample(prompts, len(prompts))
        group, order = order[:size], order[size:]
        batches.append(make_batch(group, device))
    return batches


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean loss over the answers' tokens."""
    with autocast(batch.ids.device):
        hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[batch.rows, batch.columns])
        return functional.cross_entropy(logits.float(), batch.targets)


def train_sibling(subject: Subject, batches: Sequence[Batch], strength: Strength) -> dict[str, Any]:
    """Fine-tune the base's weights under its own RoPE; the model is the sibling afterwards.

    Returns:
        The first and the last losses.
    """
    count = len(batches)
    # Warm up over ten steps; from half of the steps on go down in a straight line.
    losses = list(fine_tune(subject, batches, strength, lambda step: min(
        1.0, (step + 1) / 10, 2 * (count - step) / count)))
    tail = losses[-10:]
    return {"first_loss": float(losses[0]), "last_loss": float(sum(tail) / len(tail))}


def fine_tune(subject: Subject, batches: Sequence[Batch], strength: Strength,
              schedule: Callable[[int], float]) -> Iterator[Tensor]:
    """Fine-tune from the base's weights and yield the loss of each step, once it is done.

    Args:
        schedule: step, from 0 -> share of the learning rate.
    """
    subject.become()
    model, wanted = subject.model, TRAINED[strength.part]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(piece in name for piece in wanted))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=strength.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=subject.device.type == "cuda")
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = strength.lr * schedule(step)
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
    model.requires_grad_(False)
