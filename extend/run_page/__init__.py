"""The page of a run: one HTML file that tells all of it, from records, manifests and results.

It is the only place that looks at what all kinds of stages left, so it lies above them.
"""

from extend.run_page.page import MOST_BYTES, PAGE_NAME, write_run_page

__all__ = ["MOST_BYTES", "PAGE_NAME", "write_run_page"]
