"""A recipe with every stage, small enough to run in seconds, for the tests of whole runs."""

from pathlib import Path

from tests.train.tiny import save_examples, save_model, save_text

RECIPE = """\
name: small
seed: 3
stages:
  - {name: rescaled, stage: rescale, model: base, to: 128, method: ntk}
  - name: long
    stage: train
    model: rescaled
    nproc: 2
    save_every: 2
    loss_chunk: 48
    schedule:
      - {length: 128, steps: 6, batch_rows: 1, lr: 3e-3}
    data:
      - {kind: text, path: text.jsonl}
      - {kind: retrieval}
  - name: sibling
    stage: train
    model: base
    nproc: 1
    save_every: 2
    loss_chunk: 48
    schedule:
      - {length: 64, steps: 6, batch_rows: 2, lr: 3e-3}
    data:
      - {kind: examples, path: examples.jsonl}
  - {name: adapter, stage: extract, base: base, tuned: long, rank: 4}
  - {name: merged, stage: merge, adapter: adapter, target: sibling}
  - {name: eval-base, stage: eval, model: base, tasks: [passkey], lengths: [320], depths: 4,
     trials: 2}
  - {name: eval-merged, stage: eval, model: merged, tasks: [passkey], lengths: [320], depths: 4,
     trials: 2}
  - {name: report, stage: report, results: {base: eval-base, merged: eval-merged}}
"""
TIMINGS = ("seconds", "wait_seconds", "tokens_per_second", "tokens_per_second_per_gpu",
           "eta_seconds", "peak_memory_bytes", "host_memory_bytes")
"""What lines of metrics say of the time that a run took."""
STAGES = ("rescaled", "long", "sibling", "adapter", "merged", "eval-base", "eval-merged", "report")


def write_inputs(directory: Path, recipe: str = RECIPE) -> Path:
    """Write a model, texts and the recipe that names them; return the recipe's path."""
    save_model(directory / "base")
    return write_recipe(directory, recipe)


def write_recipe(directory: Path, recipe: str) -> Path:
    """Write the texts that a recipe trains on and the recipe itself; return its path."""
    save_text(directory)
    save_examples(directory)
    path = directory / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    return path
