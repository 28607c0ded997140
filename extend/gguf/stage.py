"""The stage `import`: a GGUF file, dequantized, as a checkpoint in Hugging Face format."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.checkpoint import Checkpoint, TensorInfo, copy_side_files, write_checkpoint
from extend.errors import CheckpointError, CompatibilityError, RecipeError
from extend.gguf.architectures import Architecture, find_architecture
from extend.gguf.header import Header
from extend.gguf.tokenizer import write_tokenizer
from extend.inputs import local_path, takes_models
from extend.manifest import Manifest
from extend.model_config import parse_config, write_rope
from extend.output import atomic_directory, write_json

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor

log = logging.getLogger(__name__)

_BLOCK_VALUES = 2**24  # that exist in fp32 at once: 64 MiB
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@takes_models("file")
def import_gguf(file: Path | str, out: Path | str, *, dtype: str = "bfloat16",
                tokenizer: Path | str | None = None, overwrite: bool = False) -> Path:
    """Write a GGUF model as a safetensors checkpoint with config and tokenizer.

    Values are dequantized to fp32 and rounded once. What llama.cpp's converter changed is undone
    (the order of the rows of q and k, norms with one added). Memory is bounded by a block of rows.

    Args:
        file: a GGUF file, or the first of its parts (`NAME-00001-of-0000N.gguf`); on the Hub
            `org/name:FILE.gguf`, or `org/name@revision:FILE.gguf`.
        out: directory to create.
        dtype: float32, bfloat16 or float16.
        tokenizer: checkpoint whose tokenizer to take in place of the file's own.
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: no such dtype.
        CheckpointError: a file that is damaged or incomplete, a value that overflows the dtype,
            or an `out` that cannot be written.
        CompatibilityError: an architecture, tensor, RoPE or tokenizer that is not supported.
    """
    if dtype not in _STORED:
        raise RecipeError(f"dtype: unknown {dtype!r}; choose one of {', '.join(_STORED)}")
    file, out = Path(file), Path(out)
    header = Header(file)
    architecture = find_architecture(header)
    config = read_model_config(header, architecture, dtype)
    sources = _sources(header, architecture, config)
    inputs = {"file" if number == 0 else f"file.{number + 1}": path
              for number, path in enumerate(header.paths)}
    if tokenizer is not None:
        inputs["tokenizer"] = tokenizer = local_path(tokenizer, weights=False)
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        manifest = Manifest("import", inputs, {"dtype": dtype})
        _write_tokenizer(header, partial, config["max_position_embeddings"], tokenizer)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _generation(header, config))
        types = _write_weights(partial, sources, architecture, config, dtype)
        manifest.write(partial, architecture=header.architecture, quantization=types,
                       name=header.get("general.name"), license=header.get("general.license"))
    log.info("imported %d tensors (%s) as %s", len(sources),
             ", ".join(f"{count} {name}" for name, count in types.items()), dtype)
    return out


def read_model_config(header: Header, architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config in every spelling of the RoPE."""
    try:
        raw = {**architecture.config(header), "dtype": dtype}
        parsed = parse_config(raw, header.path)
        written = write_rope(raw, parsed.rope, parsed.max_position_embeddings)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{header.path}: a key holds a value of the wrong kind "
                              f"({error}); fetch the file again") from error
    if parsed.num_layers > len(header.tensors):
        raise CheckpointError(f"{header.path}: announces {parsed.num_layers} layers but holds "
                              f"{len(header.tensors)} tensors; fetch the file again")
    return dict(sorted(written.items()))


def _generation(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of a chat may end with another token than a text does."""
    found = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
             if key in config}
    turn = header.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != found.get("eos_token_id"):
        found["eos_token_id"] = [found["eos_token_id"], int(turn)] if "eos_token_id" in found \
            else int(turn)
    return found


def _sources(header: Header, architecture: Architecture,
             config: Mapping[str, Any]) -> dict[str, "ReaderTensor"]:
    """Name in the checkpoint -> tensor of the file, of just those that the model has.

    Raises:
        CompatibilityError: names or shapes that are not those of the architecture in transformers.
    """
    names = architecture.names_of(header)
    sources = {new: header.tensors[old] for old, new in names.items()}
    expected = _parameters(config)
    problems = [f"{name} is missing" for name in expected if name not in sources]
    problems += [f"{name} does not belong there" for name in sources if name not in expected]
    problems += [f"{name} has shape {_shape(tensor)}, not {expected[name]}"
                 for name, tensor in sources.items()
                 if name in expected and _shape(tensor) != expected[name]]
    if problems:
        raise CompatibilityError(f"{header.path}: is no whole {config['model_type']} model: "
                                 f"{'; '.join(problems[:4])}"
                                 + (f"; and {len(problems) - 4} more" if problems[4:] else ""))
    return {name: sources[name] for name in sorted(sources)}


def _parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what transformers would load, without a tied output head."""
    import torch
    from transformers import AutoModelForCausalLM

    from extend.loading import load_hf_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_hf_config(parse_config(config, Path("config.json"))))
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()
            if name not in tied}


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _write_weights(directory: Path, sources: Mapping[str, "ReaderTensor"],
                   architecture: Architecture, config: dict[str, Any],
                   dtype: str) -> dict[str, int]:
    """Write the weights; return how many tensors each quantization type had."""
    infos = [TensorInfo(name, _STORED[dtype], _shape(tensor)) for name, tensor in sources.items()]
    write_checkpoint(directory, infos, lambda name: _read(sources[name], architecture, config,
                                                          dtype))
    Checkpoint(directory)
    return dict(Counter(tensor.tensor_type.name for tensor in sources.values()).most_common())


def _read(tensor: "ReaderTensor", architecture: Architecture, config: dict[str, Any],
          dtype: str) -> Iterator["torch.Tensor"]:
    """Rows of a tensor, in blocks, as they were before the conversion."""
    import torch
    from gguf import dequantize

    from extend.loading import DTYPES

    shape = _shape(tensor)
    rows = len(tensor.data)
    if not architecture.moves_rows(tensor.name):
        rows = max(1, _BLOCK_VALUES * len(tensor.data) // max(1, int(tensor.n_elements)))
    for start in range(0, len(tensor.data), rows):
        try:
            values = dequantize(tensor.data[start:start + rows], tensor.tensor_type)
        except NotImplementedError as error:
            raise CompatibilityError(f"tensor {tensor.name!r}: {error}") from None
        values = architecture.undo(tensor.name, values.reshape(-1, *shape[1:]), config)
        block = torch.from_numpy(values.copy()).to(DTYPES[dtype])
        if not block.isfinite().all():
            raise CheckpointError(f"tensor {tensor.name!r} holds values that are infinite or NaN "
                                  f"in {dtype}; choose another dtype, or fetch the file again")
        yield block


def _write_tokenizer(header: Header, directory: Path, max_len: int,
                     source: Path | str | None) -> None:
    if source is None:
        write_tokenizer(header, directory, max_len)
        return
    if not (Path(source) / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{source}: holds no tokenizer_config.json; give the checkpoint that "
                              "the GGUF file was made from")
    copy_side_files(Path(source), directory, max_len=max_len)
