"""Parts of scripts/transfer_trials.py: what of a long context survives a merge, and what it costs."""
