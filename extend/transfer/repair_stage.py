"""The stage `repair`: a merged checkpoint in, the same checkpoint with its target's skill out."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from extend.adapter_format.sidecar import ModelIdentity, parameter_infos
from extend.checkpoint import Checkpoint, copy_side_files, torch_dtype, write_checkpoint
from extend.errors import CompatibilityError
from extend.loading import choose_device, choose_dtype, load_causal_lm
from extend.manifest import Manifest
from extend.model_config import ModelConfig, read_config
from extend.options import local_options
from extend.output import atomic_directory, require_new, write_json
from extend.tokenizer import load_tokenizer
from extend.transfer.learn import LearnSettings
from extend.transfer.objective import Lesson, judge
from extend.transfer.plot import draw_course
from extend.transfer.repair import Repair, repair_model
from extend.transfer.setup import check_tokens, describe_inputs, make_lesson
from extend.transfer_options import RepairOptions

log = logging.getLogger(__name__)
RESULTS_NAME = "repair.json"
PICTURE_NAME = "repair.png"
_LR_FULL, _LR_LORA = 2e-5, 2e-4  # the first as in docs/results/transfer


def repair(options: RepairOptions, out: Path | str, *, overwrite: bool = False) -> Path:
    """Repair a merged model and write it to `out`.

    Config, RoPE, tokenizer and all that is not trained stay as they are in the merged model, bit
    for bit.

    Args:
        options: which model, after whose answers, and how.
        out: the checkpoint directory to make; `repair.json` and `repair.png` in it say
            what was reached.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: an option out of range.
        DataError: prompts or text that are missing, malformed, too short or too long.
        CompatibilityError: merged model and reference that do not belong together.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
        TrainingError: a loss that is not finite.
    """
    options = local_options(options)
    require_new(out, overwrite=overwrite)
    config, reference = read_config(options.merged), read_config(options.reference)
    files = Checkpoint(options.merged)
    tokenizer = _check_pair(options, config, reference, files)
    device = choose_device(options.device)
    inputs = describe_inputs(options, ("merged", "reference"))
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        manifest = Manifest("repair", inputs, options.model_dump(mode="json"), options.seed)
        target = load_causal_lm(options.reference, reference, device=device,
                                dtype=choose_dtype("auto", device))
        _check_names(target, files)
        lesson = make_lesson(target, tokenizer, options, config.max_position_embeddings)
        del target
        model = load_causal_lm(options.merged, config, device=device, dtype=torch.float32)
        lr = options.lr or (_LR_FULL if options.rank is None else _LR_LORA)
        done = repair_model(model, lesson, rank=options.rank, seed=options.seed,
                            settings=LearnSettings(steps=options.steps, lr=lr, keep=options.keep,
                                                   check_every=10))
        done = _round(model, done, files, lesson)
        _write(partial, options, config, files, model, done)
        scores = {name: s.to_json() for name, s in done.scores.items()}
        write_json(partial / RESULTS_NAME, {"schema": 1, "step": done.step, "scores": scores,
                                            "history": done.history})
        draw_course(partial / PICTURE_NAME, {"repair": done.history})
        manifest.write(partial, step=done.step, trained=len(done.trained), scores=scores)
    for name, found in done.scores.items():
        log.info("%-8s %s", name, found.text())
    return Path(out)


def _check_pair(options: RepairOptions, config: ModelConfig, reference: ModelConfig,
                files: Checkpoint) -> object:
    """The tokenizer of both; refuse a reference that is another model."""
    mine = ModelIdentity.of(config, parameter_infos(config, files))
    theirs = ModelIdentity.of(
        reference, parameter_infos(reference, Checkpoint(options.reference)))
    problems = mine.differences(theirs, "the merged model", "the reference")
    if problems:
        raise CompatibilityError(f"{options.merged} was not merged from {options.reference}: "
                                 f"{'; '.join(problems)}; give the target of the merge")
    tokenizer = load_tokenizer(options.reference)
    check_tokens(load_tokenizer(options.merged).get_vocab(), tokenizer.get_vocab(), options.merged,
                 options.reference)
    return tokenizer


def _check_names(model: PreTrainedModel, files: Checkpoint) -> None:
    for name, _ in model.named_parameters():
        if name not in files.infos:
            raise CompatibilityError(
                f"{files.directory}: the files hold no {name}, which the loaded model has; "
                "checkpoints that transformers converts while loading are not supported yet")


@torch.no_grad()
def _round(model: PreTrainedModel, done: Repair, files: Checkpoint, lesson: Lesson) -> Repair:
    """Round what was trained as it will be stored, and judge that where it makes a difference."""
    rounded = False
    for name in done.trained if done.step else ():
        dtype = torch_dtype(files.infos[name].dtype)
        if dtype != torch.float32:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.to(dtype))
            rounded = True
    return replace(done, scores={**done.scores, "written": judge(model, lesson)}) \
        if rounded else done


def _write(directory: Path, options: RepairOptions, config: ModelConfig, files: Checkpoint,
           model: PreTrainedModel, done: Repair) -> None:
    trained = frozenset(done.trained) if done.step else frozenset()

    def read(name: str) -> Tensor:
        if name not in trained:
            return files.read(name)
        return model.get_parameter(name).detach().to(torch_dtype(files.infos[name].dtype)).cpu()

    write_checkpoint(directory, list(files.infos.values()), read, file_of=files.file_of)
    copy_side_files(files.directory, directory, max_len=config.max_position_embeddings)
    shutil.copyfile(config.path, directory / "config.json")
