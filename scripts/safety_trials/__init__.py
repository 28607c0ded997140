"""Parts of scripts/merge_safety.py: what RoPE changes do to the skills of fine-tunes."""
