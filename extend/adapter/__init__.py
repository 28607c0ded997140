"""Turn the difference of two checkpoints into a LoRA adapter that carries its own RoPE change."""

from extend.adapter.cut import cut
from extend.adapter.extract import extract
from extend.adapter.report import adapter_report

__all__ = ["adapter_report", "cut", "extract"]
