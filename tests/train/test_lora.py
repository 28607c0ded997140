"""Adapters, and norms and embeddings beside them, against PEFT's own step and LongLoRA's list."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from extend.errors import RecipeError
from extend.model_config import read_config
from extend.train.data import IGNORE, load_rows
from extend.train.loop import train
from extend.train.model import load_model
from extend.train.optim import learning_rate
from extend.train.trained import trained_parameters
from tests.train.test_loop import assert_close_weights, metrics, row_loss
from tests.train.tiny import options, save_model, save_text

PHASE = {"length": 128, "steps": 3, "batch_rows": 2, "lr": 1e-3, "rope": {"method": "ntk"}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


def lora(directory: Path, **changes: object):
    return options(directory, [{"kind": "retrieval"}], mode="lora", lora_rank=4,
                   **({"schedule": [PHASE]} | changes))


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def longlora(model: torch.nn.Module) -> None:
    """What LongLoRA's code does after `get_peft_model`: trainable_params = "embed,norm"."""
    for name, parameter in model.named_parameters():
        if any(key in name for key in ("embed", "norm")):
            parameter.requires_grad_(True)


def test_what_is_trained_is_what_longlora_trains(model_dir: Path):
    run = lora(model_dir, trained_beside=["norms", "embeddings"])
    ours = set(trained_parameters(load_model(run, read_config(model_dir))))
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir),
                            LoraConfig(r=4, target_modules="all-linear"))
    longlora(theirs)
    assert ours == {name.removeprefix("base_model.model.")
                    for name, p in theirs.named_parameters() if p.requires_grad}
    assert sum("lora" not in name for name in ours) == 2 * 2 + 1 + 1


def test_equals_peft_step_by_step(model_dir: Path, tmp_path: Path):
    """The same adapters, trained by PEFT, transformers' eager attention and torch's AdamW."""
    text = save_text(tmp_path)
    run = lora(model_dir, lora_alpha=12, trained_beside=["norms", "embeddings"], weight_decay=0.1)
    run = run.model_copy(update={"data": options(model_dir, [
        {"kind": "text", "path": str(text)}]).data})
    out = train(run, tmp_path / "out")

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, config=AutoConfig.from_pretrained(out), attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    longlora(model)
    start = adapters(load_model(run, read_config(model_dir)))  # the only thing that is random
    model.load_state_dict({f"base_model.model.{n}": p for n, p in start.items()}, strict=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}], betas=run.betas)
    rows = load_rows(run, AutoTokenizer.from_pretrained(model_dir))
    for step, line in enumerate(metrics(out)):
        batch = [rows.row(0, 2 * step + i) for i in range(2)]
        total = sum(int((r.labels[1:] != IGNORE).sum()) for r in batch)
        loss = sum(row_loss(model, r, run, (total, 1)) for r in batch)
        loss.backward()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(trained, run.clip_norm)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.schedule[0], step)
        optimizer.step()
        optimizer.zero_grad()
    ours, source = load_file(out / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert_close_weights(ours, model.merge_and_unload().state_dict())
    still = {name for name in ours if torch.equal(ours[name], source[name])}
    assert still == {"lm_head.weight"}


def test_head_that_is_tied_goes_with_the_embeddings(tmp_path: Path):
    tied = save_model(tmp_path / "model")
    model = load_model(lora(tied, trained_beside=["embeddings"]), read_config(tied))
    assert model.get_output_embeddings().weight.requires_grad
    assert len(trained_parameters(model)) == len(adapters(model)) + 1


def test_expressions_choose_by_name(model_dir: Path):
    run = lora(model_dir, trainable=["q_proj"], trained_beside=[r"^lm_head", r"1\.mlp\.up_proj"])
    found = trained_parameters(load_model(run, read_config(model_dir)))
    assert {n for n in found if "lora" not in n} == {"lm_head.weight",
                                                     "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize(("beside", "match"), [
    (["norms", "nrom"], "trained_beside: 'nrom' matches no parameter"),
    (["up_proj"], r"trained_beside: model\.layers\.0\.mlp\.up_proj\.weight would be trained whole "
                  "and get an adapter"),
])
def test_bad_choices_are_refused(beside: list[str], match: str, model_dir: Path):
    with pytest.raises(RecipeError, match=match):
        load_model(lora(model_dir, trained_beside=beside), read_config(model_dir))


@pytest.mark.parametrize("change", [{"trained_beside": ["norms"]}, {"lora_alpha": 8}])
def test_what_belongs_to_adapters_is_refused_without(change: dict):
    with pytest.raises(ValidationError, match=f"{next(iter(change))} is for mode lora, but mode is "
                                              "full"):
        options(Path("m"), [{"kind": "retrieval"}], **change)
