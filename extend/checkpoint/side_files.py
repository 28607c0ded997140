"""What lies beside a checkpoint's weights and config."""

import shutil
from pathlib import Path

from extend.model_config import read_json
from extend.output import write_json

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
            shutil.copyfile(file, destination / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, destination / templates.name)
    if (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json")
        write_json(destination / "tokenizer_config.json", {**settings, "model_max_length": max_len})
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        generation.pop("max_length", None)
        write_json(destination / "generation_config.json", generation)
