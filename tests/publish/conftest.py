"""A run that ends in an adapter, a merged model and results; never written to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import extend
from extend.manifest import Manifest
from extend.model_config import read_config
from tests.train.tiny import save_model, save_text

RECIPE = """\
name: small  # how the tiny model got its context
stages:
  - {name: rescaled, stage: rescale, model: ./base, to: 128, method: ntk}
  - name: long
    stage: train
    model: rescaled
    schedule: [{length: 128, steps: 2, lr: 3e-3}]
    data: [{kind: text, path: texts/text.jsonl}]
  - {name: adapter, stage: extract, base: base, tuned: long, rank: 4}
  - {name: merged, stage: merge, adapter: adapter, target: sibling}
"""
TRAIN = {"schedule": [{"length": 128, "steps": 2, "tokens": None, "batch_rows": 1, "lr": 3e-3}],
         "mode": "full", "optimizer": "adamw"}


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run; the models it started from lie beside it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("secret-project")
    base, out = save_model(root / "base"), root / "out"
    save_text(root / "texts", count=4)
    (root / "recipe.yaml").write_text(RECIPE)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\n# Base\n")
    change_weights(base, root / "sibling", seed=1)
    extend.rescale(base, out / "rescaled", target_len=128, method="ntk")
    train(out / "rescaled", root / "texts" / "text.jsonl", out / "long")
    extend.extract(base, out / "long", out / "adapter", rank=4)
    extend.merge(out / "adapter", root / "sibling", out / "merged")
    extend.evaluate(out / "merged", out / "eval-merged", tasks=["passkey"], lengths=[320],
                    depths=2, trials=1)
    extend.evaluate(base, out / "eval-base", tasks=["passkey"], lengths=[320], depths=2, trials=1)
    (out / "recipe.json").write_text(json.dumps({
        "schema": 1, "path": str(root / "recipe.yaml"), "text": RECIPE}))
    return out


def change_weights(source: Path, out: Path, seed: int) -> Path:
    """A copy with other weights, as if it had been trained."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    noise = torch.Generator().manual_seed(seed)
    save_file({name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise)
               for name, tensor in weights.items()}, out / "model.safetensors",
              metadata={"format": "pt"})
    return out


def train(model: Path, text: Path, out: Path) -> None:
    """What the train stage leaves, without its seconds."""
    manifest = Manifest("train", {"model": model, "data[0]": text}, TRAIN, seed=0)
    change_weights(model, out, seed=2)
    (out / "manifest.json").unlink()
    rope = read_config(out).rope.to_json()
    manifest.write(out, processes=1, metrics={"tokens": 256, "loss": 5.25}, rope_before=rope,
                   rope_after=rope, max_position_embeddings=128)
