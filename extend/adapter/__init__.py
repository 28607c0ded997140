"""Turn the difference of two checkpoints into a LoRA adapter that carries its own RoPE change."""

from extend.adapter.extract import extract

__all__ = ["extract"]
