#!/usr/bin/env python3
"""What a PEFT user's merge script does: peft_merge.py TARGET ADAPTER OUT DEVICE."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(target: str, adapter: str, out: str, device: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).to(device)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
