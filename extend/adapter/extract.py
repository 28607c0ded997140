"""The stage `extract`: long model minus base model -> LoRA adapter and sidecar."""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from extend.adapter.extraction import Extraction
from extend.adapter.fold import Folding
from extend.adapter.fold import fold_norms as fold
from extend.adapter.parts import Parts, fingerprint
from extend.adapter.rank import FLOATS_OF_32_BITS, LIMIT_32_BITS, RankRule
from extend.adapter.report import write_report
from extend.adapter.workers import Workers, pick_devices, spread
from extend.adapter_format.peft_files import ADAPTER_WEIGHTS, stored_dtype
from extend.adapter_format.serving import check_serving
from extend.adapter_format.serving_files import adapter_serving, verdict_line, write_serving
from extend.adapter_format.vocabulary import write_adapter_vocabulary
from extend.delta.pair import (
    ModelPair,
    in_layer_order,
    is_experts,
    is_linear,
    is_vocabulary,
    open_pair,
)
from extend.delta.sample import write_sample
from extend.errors import CompatibilityError, RecipeError
from extend.inputs import takes_models
from extend.manifest import Manifest
from extend.output import atomic_directory, stamp_files
from extend.rope.engines import differing_engines
from extend.tokenizer import read_vocabulary

log = logging.getLogger(__name__)


@takes_models("base", "tuned")
def extract(base: Path | str, tuned: Path | str, out: Path | str, *, rank: int | None = None,
            energy: float | None = None, adapter_bytes: int | None = None, exact: bool = False,
            embeddings: bool = True, fold_norms: bool = False, dtype: str = "float32",
            seed: int = 0, device: str = "auto", overwrite: bool = False) -> Path:
    """Write the difference of two checkpoints as a LoRA adapter with a sidecar.

    Give one of `rank`, `energy` and `adapter_bytes`, or none: then every module gets the singular
    values that stand out of the rounding noise of the tuned model's stored dtype: at most 512, and
    factors of at most half the matrix's elements. A tuned model stored in 32 bits has next to no
    such noise; its modules get at most rank 32.

    Beside the adapter lie `report.html` and `report.json`: what each module keeps, the singular
    values, what a merge in 16 bits loses, and what smaller adapters would keep.

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
        fold_norms: carry the deltas of norms inside those of the linear weights that they feed
            (see `extend.adapter.fold`), so that a server that takes lora_A and lora_B alone gets
            them; the others stay in the sidecar.
        dtype: of the stored factors: float32, bfloat16 or float16. The sidecar is always fp32.
        seed: of the random sketches.
        device: cpu, cuda, a list such as `cuda:0,cuda:1`, or auto: every CUDA device there is,
            else the CPU. Matrices go to whichever is free; what comes out does not depend on
            their number. One named once gets as many threads as suit it, one named several times
            as many as that.
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
               "exact": exact, "embeddings": embeddings, "fold_norms": fold_norms, "dtype": dtype}
    store, devices = stored_dtype(dtype), pick_devices(device)
    folding = fold(open_pair(base, tuned)) if fold_norms else Folding(pair=open_pair(base, tuned))
    _say_left(folding)
    pair = folding.pair
    linear = in_layer_order(name for name, info in pair.infos.items() if is_linear(info))
    _check_rank(rank, pair, linear)
    _say_limit(rule, pair, linear)
    devices, threads = spread(devices, _largest_matrix(pair))
    inputs = {"base": base, "tuned": tuned}
    with atomic_directory(out, overwrite=overwrite, inputs=inputs) as partial:
        manifest = Manifest("extract", inputs, options, seed)
        mark = fingerprint(stamp_files(inputs), options, seed, torch.device(devices[0]).type)
        with Parts(out, mark) as parts, Workers(devices, threads) as workers:
            found = Extraction(pair, workers, store, embeddings, rule, parts)
            _take(found, linear, frozenset(folding.folded), partial)
            found.write_adapter(partial, base_name=base)
            # Parts stay until all is written, so that what fails late has not lost them.
            sidecar = found.describe(manifest.record, {**options, "seed": seed})
            sidecar.model_copy(update={"folded": folding.folded}).write(partial)
            _write_companions(partial, found)
            write_report(partial, pair.base)
        summary = found.summary((partial / ADAPTER_WEIGHTS).stat().st_size)
        manifest.write(partial, **summary, folded=len(folding.folded), not_folded=folding.left)
    log.info("adapter of %(modules)d modules, %(adapter_bytes)d bytes, mean residual "
             "%(mean_residual).4f, largest %(max_residual).4f", summary)
    log.info("%s", verdict_line(check_serving(out)))
    return Path(out)


def _take(found: Extraction, linear: list[str], folded: frozenset[str], partial: Path) -> None:
    """Take all but folded norms; the sidecar is made while linear weights are factorized."""
    infos = found.pair.infos
    experts = in_layer_order(name for name, info in infos.items() if is_experts(info))
    found.take_experts(experts, linear)

    def make_sidecar() -> None:
        found.take_rest(in_layer_order(set(infos) - {*linear, *experts, *folded}))
        found.write_sidecar(partial)

    with ThreadPoolExecutor(1, "sidecar", torch.set_num_threads, (1,)) as background:
        made = background.submit(make_sidecar)
        found.take_linear(linear)
        made.result()


def _write_companions(directory: Path, found: Extraction) -> None:
    """What merge and lineage ask of the base, and how to serve the adapter."""
    pair = found.pair
    tokens = read_vocabulary(pair.base.directory)
    # By the base's tokens merge maps the rows of embedding deltas.
    if tokens is not None and any(map(is_vocabulary, found.tensors)):
        write_adapter_vocabulary(directory, tokens)
    write_sample(pair.base, pair.infos, directory)
    notes = differing_engines(str(pair.tuned_config.raw.get("model_type")), pair.tuned_config.rope)
    write_serving(directory, adapter_serving(directory, tokenizer_dir=pair.base.directory,
                                             notes=notes))


def _largest_matrix(pair: ModelPair) -> int:
    """Elements of the largest that is decomposed at once."""
    return max(math.prod(info.shape[-2:]) for info in pair.infos.values()
               if is_linear(info) or is_experts(info))


def _say_limit(rule: RankRule, pair: ModelPair, linear: list[str]) -> None:
    stored = sorted({pair.tuned.infos[name].dtype for name in linear})
    if rule.name == "noise" and set(stored) & set(FLOATS_OF_32_BITS):
        log.info("%s is stored in %s, in which rounding hides nothing: ranks end at %d; give a "
                 "rank, an energy or a size in bytes for more", pair.tuned.directory,
                 ", ".join(stored), LIMIT_32_BITS)


def _say_left(folding: Folding) -> None:
    for name, why in folding.left.items():
        log.info("%s is not folded: %s; its delta goes to the sidecar", name, why)


def _check_rank(rank: int | None, pair: ModelPair, linear: list[str]) -> None:
    if not linear:
        raise CompatibilityError(f"{pair.base.directory}: holds no linear weight of a decoder "
                                 "layer; only decoder models in Hugging Face format are supported")
    largest = max(linear, key=lambda name: min(pair.infos[name].shape))
    limit = min(pair.infos[largest].shape)
    if rank is not None and rank > limit:
        raise RecipeError(f"rank is {rank}, larger than every matrix: the largest is {largest} "
                          f"{list(pair.infos[largest].shape)}; give a rank of at most {limit}")
