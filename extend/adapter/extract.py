"""The stage `extract`: long model minus base model -> LoRA adapter and sidecar."""

import logging
from pathlib import Path

import torch

from extend.adapter.extraction import Extraction
from extend.adapter.parts import Parts, fingerprint
from extend.adapter.rank import FLOATS_OF_32_BITS, LIMIT_32_BITS, RankRule
from extend.adapter_format.peft_files import ADAPTER_WEIGHTS, stored_dtype
from extend.adapter_format.vocabulary import write_adapter_vocabulary
from extend.delta.pair import ModelPair, in_layer_order, is_linear, is_vocabulary, open_pair
from extend.delta.sample import write_sample
from extend.errors import CompatibilityError, RecipeError
from extend.manifest import Manifest
from extend.output import atomic_directory
from extend.tokenizer import read_vocabulary

log = logging.getLogger(__name__)


def extract(base: Path | str, tuned: Path | str, out: Path | str, *, rank: int | None = None,
            energy: float | None = None, adapter_bytes: int | None = None, exact: bool = False,
            embeddings: bool = True, dtype: str = "float32", seed: int = 0, device: str = "auto",
            overwrite: bool = False) -> Path:
    """Write the difference of two checkpoints as a LoRA adapter with a sidecar.

    Give one of `rank`, `energy` and `adapter_bytes`, or none: then every module gets the singular
    values that stand out of the rounding noise of the tuned model's stored dtype: at most 512, and
    factors of at most half the matrix's elements. A tuned model stored in 32 bits has next to no
    such noise; its modules get at most rank 32.

    Finished modules are kept in a directory beside `out` until the end. The same call after an
    interruption goes on from there; memory is bounded by the largest tensor.

    Args:
        base: checkpoint directory of the short model.
        tuned: checkpoint directory of the long model; same parameters as `base`.
        out: the adapter directory to make.
        rank: of every module, capped at each matrix's own size.
        energy: in (0, 1]: the fewest ranks per module that hold this fraction of ||delta||_F^2.
            On a delta near the rounding of bf16 weights this chases noise.
        adapter_bytes: the largest size of `adapter_model.safetensors`, without the sidecar. It is
            spent where singular values are largest; every module keeps rank 1 at least.
        exact: decompose Gram matrices in fp64 rather than random sketches; slower.
        embeddings: False leaves the deltas of the embedding and the head out and records their
            norms; the merged model then differs from the long one by them.
        dtype: of the stored factors: float32, bfloat16 or float16. The sidecar is always fp32.
        seed: of the random sketches.
        device: cpu, cuda, or auto (cuda where there is one).
        overwrite: replace `out` if it exists.

    Returns:
        `out`.

    Raises:
        RecipeError: an option out of range, a rank larger than every matrix, or a size too small.
        CompatibilityError: the checkpoints do not fit together, or no linear weight differs.
        CheckpointError: a file is missing or damaged, or `out` cannot be written.
    """
    rule = RankRule(rank=rank, energy=energy, adapter_bytes=adapter_bytes, exact=exact, seed=seed)
    options = {"rule": rule.name, "rank": rank, "energy": energy, "adapter_bytes": adapter_bytes,
               "exact": exact, "embeddings": embeddings, "dtype": dtype}
    store, device = stored_dtype(dtype), _pick_device(device)
    pair = open_pair(base, tuned)
    linear = in_layer_order(name for name, info in pair.infos.items() if is_linear(info))
    _check_rank(rank, pair, linear)
    _say_limit(rule, pair, linear)
    inputs = {"base": base, "tuned": tuned}
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        manifest = Manifest("extract", inputs, options, seed)
        mark = fingerprint(manifest.record, device=torch.device(device).type)
        with Parts(out, mark) as parts:
            found = Extraction(pair, device, store, embeddings, rule, parts)
            found.take_linear(linear)
            found.take_rest(in_layer_order(set(pair.infos) - set(linear)))
            found.write(partial, base_name=str(base))
        _write_vocabulary(partial, found)
        write_sample(pair.base, pair.infos, partial)
        found.describe(manifest.record, {**options, "seed": seed}).write(partial)
        summary = found.summary((partial / ADAPTER_WEIGHTS).stat().st_size)
        manifest.write(partial, **summary)
    log.info("adapter of %(modules)d modules, %(adapter_bytes)d bytes, mean residual "
             "%(mean_residual).4f, largest %(max_residual).4f", summary)
    return Path(out)


def _write_vocabulary(directory: Path, found: Extraction) -> None:
    """The base's tokens, by which merge maps the rows of embedding deltas."""
    tokens = read_vocabulary(found.pair.base.directory)
    if tokens is not None and any(map(is_vocabulary, found.tensors)):
        write_adapter_vocabulary(directory, tokens)


def _say_limit(rule: RankRule, pair: ModelPair, linear: list[str]) -> None:
    stored = sorted({pair.tuned.infos[name].dtype for name in linear})
    if rule.name == "noise" and set(stored) & set(FLOATS_OF_32_BITS):
        log.info("%s is stored in %s, in which rounding hides nothing: ranks end at %d; give a "
                 "rank, an energy or a size in bytes for more", pair.tuned.directory,
                 ", ".join(stored), LIMIT_32_BITS)


def _pick_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"device: unknown {device!r}; choose one of auto, cpu, cuda")
    if device.startswith("cuda") and not available:
        raise RecipeError(f"device is {device!r} but torch sees no CUDA device; choose cpu or auto")
    return device


def _check_rank(rank: int | None, pair: ModelPair, linear: list[str]) -> None:
    if not linear:
        raise CompatibilityError(f"{pair.base.directory}: holds no linear weight of a decoder "
                                 "layer; only decoder models in Hugging Face format are supported")
    largest = max(linear, key=lambda name: min(pair.infos[name].shape))
    limit = min(pair.infos[largest].shape)
    if rank is not None and rank > limit:
        raise RecipeError(f"rank is {rank}, larger than every matrix: the largest is {largest} "
                          f"{list(pair.infos[largest].shape)}; give a rank of at most {limit}")
