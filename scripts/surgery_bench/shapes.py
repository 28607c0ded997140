"""Synthetic models of real shapes: a base, its long version, and a fine-tune to merge into."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from extend.checkpoint import TensorInfo, write_checkpoint
from extend.delta.svd import tensor_generator

ROOT = Path(__file__).resolve().parents[2]
SIGMA = 0.02  # of a base weight
DRIFT = 0.01  # ||delta|| / ||W|| of its low-rank part
TRUE_RANK = 128  # of the delta; singular values fall as 1 / (1 + i / 8)
DENSE = 0.001  # of a full-rank part beside it, relative to ||W||
SHARD_BYTES = {"8b": 5_000_000_000, "1b": 1_000_000_000}


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def tensors(self) -> list[TensorInfo]:
        """Every parameter, bf16, in the order of the file."""
        kv, q = self.kv_heads * self.head_dim, self.heads * self.head_dim
        linear = {"self_attn.q_proj": (q, self.hidden), "self_attn.k_proj": (kv, self.hidden),
                  "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, q),
                  "mlp.gate_proj": (self.mlp, self.hidden), "mlp.up_proj": (self.mlp, self.hidden),
                  "mlp.down_proj": (self.hidden, self.mlp)}
        infos = [("model.embed_tokens", (self.vocab, self.hidden))]
        for layer in range(self.layers):
            infos += [(f"model.layers.{layer}.{name}", shape) for name, shape in linear.items()]
            infos += [(f"model.layers.{layer}.{norm}", (self.hidden,))
                      for norm in ("input_layernorm", "post_attention_layernorm")]
        infos.append(("model.norm", (self.hidden,)))
        if not self.tied:
            infos.append(("lm_head", (self.vocab, self.hidden)))
        return [TensorInfo(f"{name}.weight", "BF16", shape) for name, shape in infos]

    def config(self, theta: float, length: int) -> dict:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "hidden_size": self.hidden, "intermediate_size": self.mlp,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
                "vocab_size": self.vocab, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                "tie_word_embeddings": self.tied, "max_position_embeddings": length,
                "rope_theta": theta, "torch_dtype": "bfloat16", "bos_token_id": 0,
                "eos_token_id": 1, "attention_bias": False, "mlp_bias": False}


SHAPES = {
    "tiny": Shape(2, 64, 96, 4, 2, 16, 256, True),
    "smollm2": Shape(30, 576, 1536, 9, 3, 64, 49152, True),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
}
"""name -> sizes: SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""
ROLES = {"base": (5e5, 8192), "tuned": (8e6, 131072), "target": (5e5, 8192)}
"""role -> (rope_theta, length)."""


def make_models(shape: Shape, root: Path, *, device: str, max_shard_bytes: int) -> None:
    """Write the directories of all roles below `root`, each unless it is there already."""
    for role, (theta, length) in ROLES.items():
        directory = root / role
        if (directory / "config.json").exists():
            continue
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        shapes = {info.name: info.shape for info in shape.tensors()}
        write_checkpoint(directory, shape.tensors(), lambda name, role=role, shapes=shapes: (
            _rows(role, name, shapes[name], device)), max_shard_bytes=max_shard_bytes)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(ROOT / "assets/demo/base" / file, directory / file)
        (directory / "config.json").write_text(json.dumps(shape.config(theta, length)))


def _rows(role: str, name: str, shape: tuple[int, ...], device: str) -> Iterator[torch.Tensor]:
    """A tensor of a role; the same every time on the same kind of device."""
    seed = tensor_generator(name, 0).initial_seed()
    generator = torch.Generator(device).manual_seed(seed)
    base = torch.randn(shape, generator=generator, device=device).mul_(SIGMA)
    if len(shape) == 1:
        base += 1
    base = base.bfloat16()
    if role == "base" or len(shape) == 1 or ".layers." not in name:
        yield base.cpu()
        return
    generator.manual_seed(seed + 1 + (role == "target"))
    yield (base.float() + delta(shape, generator, device)).bfloat16().cpu()


def delta(shape: tuple[int, int], generator: torch.Generator, device: str) -> torch.Tensor:
    """A fine-tune's change: falling singular values, and a little of full rank; fp32."""
    rank = min(TRUE_RANK, *shape)
    left = torch.randn(shape[0], rank, generator=generator, device=device)
    right = torch.randn(rank, shape[1], generator=generator, device=device)
    values = 1 / (1 + torch.arange(rank, device=device) / 8)
    low = (left * values) @ right
    low *= DRIFT * SIGMA * math.sqrt(shape[0] * shape[1]) / low.norm()
    return low + torch.randn(shape, generator=generator, device=device).mul_(DENSE * SIGMA)
