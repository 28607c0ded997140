"""The stage `lineage`: how a target relates to its base, and to a long model's delta."""

from extend.lineage.report import Report
from extend.lineage.stage import lineage, write_lineage

__all__ = ["Report", "lineage", "write_lineage"]
