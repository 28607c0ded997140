"""Parts of scripts/transfer_trials.py: what of a long context a merge keeps, and its price."""
