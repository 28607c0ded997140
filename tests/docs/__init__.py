"""The pages and the site; `docs_site` is found as when scripts/docs runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
