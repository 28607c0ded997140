"""Merge an adapter, with its RoPE change, into a fine-tune of the adapter's base."""

from extend.merge.apply import merge

__all__ = ["merge"]
