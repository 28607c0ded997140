"""Merges that learn from a few unlabelled prompts: fitted weights, and a short repair."""

from extend.transfer.fit_stage import fit
from extend.transfer.repair_stage import repair

__all__ = ["fit", "repair"]
