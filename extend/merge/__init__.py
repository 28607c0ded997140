"""Merge an adapter, with its RoPE change, into a fine-tune of the adapter's base."""

from extend.merge.apply import merge
from extend.merge.preview import Preview, preview

__all__ = ["Preview", "merge", "preview"]
