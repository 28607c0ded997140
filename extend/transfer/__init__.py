"""Merges that learn from a few unlabelled prompts: fitted weights, and a short repair."""
