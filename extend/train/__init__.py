"""Fine-tune a model on long rows, each row spread over several processes."""

from extend.train.loop import train

__all__ = ["train"]
