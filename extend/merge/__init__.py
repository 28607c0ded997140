"""Merge deltas, with their RoPE change, into a fine-tune of their base.

Importing this package imports no torch; `merge` and `preview` do so when they are asked for.
"""

from typing import TYPE_CHECKING, Any

from extend.merge.methods import METHODS

if TYPE_CHECKING:
    from extend.merge.apply import merge
    from extend.merge.dry_run import Preview, preview

__all__ = ["METHODS", "Preview", "merge", "preview"]


def __getattr__(name: str) -> Any:
    if name == "merge":
        from extend.merge.apply import merge

        return merge
    if name in ("Preview", "preview"):
        from extend.merge import dry_run

        return getattr(dry_run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
