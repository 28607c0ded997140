"""GGUF files in: dequantized to a checkpoint in Hugging Face format, tokenizer and all."""

from extend.gguf.stage import import_gguf

__all__ = ["import_gguf"]
