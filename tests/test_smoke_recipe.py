"""The recipes for real models, as scripts/smoke_recipe.py makes them small."""

from pathlib import Path

import pytest

from extend.model_config import read_config
from extend.recipe import load_recipe
from extend.rope.presets import PRESETS

ROOT = Path(__file__).parents[1]
# One of each architecture, and one that starts from a long model, are written whole.
WRITTEN = ("adapter-only", "gemma3-270m-128k", "mistral-7b-128k", "qwen3-8b-256k")
LARGE = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")
               if path.stem not in ("demo", "smollm2-135m-128k", "smollm2-135m-1m"))


@pytest.mark.parametrize("name", LARGE)
def test_small_recipe_loads_with_its_inputs(name: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import smoke_recipe

    if name not in WRITTEN:
        for writer in ("save_tiny_model", "save_text"):
            monkeypatch.setattr(smoke_recipe, writer, lambda path, *args, **kwargs: (
                path.parent if path.suffix else path).mkdir(exist_ok=True))
    path = smoke_recipe.write_small(ROOT / "recipes" / f"{name}.yaml", tmp_path)
    small = load_recipe(path)  # every input is there
    large = load_recipe(ROOT / "recipes" / f"{name}.yaml", check_files=False)
    assert [(s.name, s.kind) for s in small.stages] == [(s.name, s.kind) for s in large.stages]
    trained = [[s.options for s in r.stages if s.kind == "train"] for r in (large, small)]
    for old, new in zip(*trained, strict=True):
        factors = {a.length / b.length for a, b in zip(old.schedule, new.schedule, strict=True)}
        assert len(factors) == 1 and new.schedule[-1].length == smoke_recipe.LONGEST
        assert new.answer_weight == old.answer_weight and new.document_mask == old.document_mask
        assert [p.context_parallel for p in new.schedule] == [
            p.context_parallel for p in old.schedule]
        if old.rope is not None and old.rope.method in PRESETS:
            thetas = PRESETS[old.rope.method].thetas
            assert [p.rope.options["rope_theta"] for p in new.schedule] == [
                thetas[p.length] for p in old.schedule]
        else:
            assert [p.rope for p in new.schedule] == [p.rope for p in old.schedule]
            assert new.rope == old.rope
    for directory in tmp_path.glob("*/config.json"):
        assert read_config(directory.parent).max_position_embeddings <= smoke_recipe.LONGEST
