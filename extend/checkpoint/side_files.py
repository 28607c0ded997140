"""What lies beside a checkpoint's weights and config."""

import shutil
from pathlib import Path

from extend.errors import CheckpointError
from extend.model_config import read_json
from extend.output import write_json
from extend.untrusted import link_problem

_SIDE_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
                  "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
                  "*.py", "LICENSE*", "NOTICE*")


def copy_side_files(source: Path, destination: Path, *, max_len: int) -> None:
    """Copy what a checkpoint holds beside weights and config, made fit for `max_len` tokens.

    Tokenizer, vocabulary, chat templates, model code, licence and `generation_config.json`. The
    tokenizer's `model_max_length` becomes `max_len`, because loaders cut or refuse longer prompts
    otherwise; a `max_length` of the generation config is dropped, because it is the old length.
    """
    for file in sorted({f for pattern in _SIDE_PATTERNS for f in source.glob(pattern)}):
        if file.is_file():
            _require_own(file, source)
            shutil.copyfile(file, destination / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        for file in (templates, *templates.rglob("*")):
            _require_own(file, source)
        shutil.copytree(templates, destination / templates.name)
    if (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json")
        write_json(destination / "tokenizer_config.json", {**settings, "model_max_length": max_len})
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        generation.pop("max_length", None)
        write_json(destination / "generation_config.json", generation)


def _require_own(file: Path, source: Path) -> None:
    """Refuse to copy what is not the checkpoint's: a link to a file elsewhere on this machine."""
    problem = link_problem(file, source)
    if problem:
        raise CheckpointError(f"{file}: {problem}; put a copy of the file there if it is meant")
