"""Merging by mergekit: TIES, DARE, DELLA, SLERP and the rest, with our checks before and after.

mergekit merges weights. It takes config and tokenizer from its base model, so that a merge with a
long model comes out with the short model's RoPE; it takes a path that it does not find for a name
on a hub; and it writes what its own list of tensors holds. Here it runs in a process of its own, on
models whose headers were compared before, and its weights are read back tensor by tensor into a
checkpoint like the target's: the target's tensors, shards, tokenizer and templates, with the long
model's RoPE and length.

Source: arcee-ai/mergekit 0.1.5, mergekit/merge.py `_model_out_config` and `_copy_tokenizer`.
"""

from extend.merge.mergekit.check import Request
from extend.merge.mergekit.methods import check_method, is_mergekits, load_methods
from extend.merge.mergekit.run import merge_by_mergekit, preview_by_mergekit

__all__ = ["Request", "check_method", "is_mergekits", "load_methods", "merge_by_mergekit",
           "preview_by_mergekit"]
