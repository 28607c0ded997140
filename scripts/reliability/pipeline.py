"""A recipe with every stage on a tiny model, and what its outputs come down to."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from extend.curves import METRICS_NAME, PICTURE_NAME
from extend.manifest import MANIFEST_NAME, hash_files
from extend.run_page import PAGE_NAME
from extend.run_record import PLAN_NAME, RECIPE_RECORD, RUN_RECORD
from tests import pipeline
from tests.gguf.writing import make_model, write_gguf
from tests.hub import Hub
from tests.train.tiny import save_tokenizer

RECIPE = pipeline.RECIPE.replace("stages:\n", """\
stages:
  - {name: base, stage: import, file: base.gguf, tokenizer: tokenizer, dtype: float32}
""", 1) + """\
  - {name: published, stage: publish, source: adapter, to: lab/adapter, base_id: lab/base,
     license: apache-2.0}
"""
STAGES = ("base", *pipeline.STAGES, "published")
RECORDS = (RUN_RECORD, RECIPE_RECORD, PLAN_NAME, PAGE_NAME)
_TELLS_SECONDS = re.compile(r"README\.md|.*manifest\.json|manifests/.*")  # that a stage took


def write_inputs(directory: Path) -> Path:
    """Write a GGUF file, a tokenizer, texts and the recipe; return the recipe's path."""
    model = make_model("llama", vocab_size=264, hidden_size=32, intermediate_size=48, head_dim=8,
                       max_position_embeddings=64, tie_word_embeddings=True)
    write_gguf(directory / "base.gguf", model)
    save_tokenizer(directory / "tokenizer")
    return pipeline.write_recipe(directory, RECIPE)


def fill_hub(hub: Hub) -> None:
    """An empty Hub, but for the base that the adapter names."""
    hub.reset()
    hub.add("lab/base", {"config.json": "{}", "README.md": "---\nlicense: apache-2.0\n---\n"})


def outcome(out: Path, hub: Hub) -> dict[str, Any]:
    """Stage -> the hashes of its files; of metrics what does not tell the time."""
    found: dict[str, Any] = {}
    for stage in STAGES[:-1]:
        files: dict[str, Any] = {name: entry["sha256"]
                                 for name, entry in hash_files(out / stage).items()}
        files.pop(PICTURE_NAME, None)  # drawn from the metrics
        if files.pop(METRICS_NAME, None):
            lines = (out / stage / METRICS_NAME).read_text().splitlines()
            files[METRICS_NAME] = [{key: value for key, value in json.loads(line).items()
                                    if key not in pipeline.TIMINGS} for line in lines]
        found[stage] = files
    repo = hub.repos["lab/adapter"]
    blobs = repo.commits[repo.refs["main"]]
    found["published"] = {name: None if _TELLS_SECONDS.fullmatch(name) else blob.sha256
                          for name, blob in sorted(blobs.items())}
    return found


def take_away(out: Path) -> None:
    """Delete a run, whose name is gone before any of its files."""
    doomed = out.with_name(f".{out.name}.doomed")
    out.rename(doomed)
    shutil.rmtree(doomed)


def check_whole(out: Path) -> list[str]:
    """Stages of which a file is not what the manifest says."""
    return [stage for stage in STAGES if (out / stage).exists()
            and json.loads((out / stage / MANIFEST_NAME).read_text())["outputs"]
            != hash_files(out / stage)]
