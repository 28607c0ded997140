"""The `search` stage: find a RoPE for a longer context on the user's own model, without training.

Importing this package does not import torch; `extend.search.stage` does so when called.
"""

from extend.search.stage import search

__all__ = ["search"]
