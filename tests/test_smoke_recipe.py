"""The recipes for large models, as scripts/smoke_recipe.py makes them small."""

from pathlib import Path

import pytest

from extend.recipe import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["llama3-8b-1m", "qwen3-8b-256k"])
def test_small_recipe_loads_with_its_inputs(name: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import smoke_recipe

    path = smoke_recipe.write_small(ROOT / "recipes" / f"{name}.yaml", tmp_path)
    small = load_recipe(path)  # every input is there
    large = load_recipe(ROOT / "recipes" / f"{name}.yaml", check_files=False)
    assert [(s.name, s.kind) for s in small.stages] == [(s.name, s.kind) for s in large.stages]
    (old,), (new,) = ([s.options for s in r.stages if s.kind == "train"] for r in (large, small))
    factors = {a.length / b.length for a, b in zip(old.schedule, new.schedule, strict=True)}
    assert len(factors) == 1 and new.schedule[-1].length == smoke_recipe.LONGEST
    assert [p.rope for p in new.schedule] == [p.rope for p in old.schedule]
    assert new.answer_weight == old.answer_weight and new.document_mask == old.document_mask
