"""What vLLM and SGLang refuse of a LoRA adapter, and what they load but compute wrongly.

Each rule is a function of a `ServingView` that yields the problems it finds. A rule restates what
the loader does, and the table of verdicts in the tests was seen from the loaders themselves.

Source: vllm 0.33.0 and 0.11.0, vllm/lora/peft_helper.py, lora_model.py (models.py in 0.11),
utils.py (`parse_fine_tuned_lora_name`), lora_weights.py (`pack_moe`) and vllm/config/lora.py;
sglang 0.5.23, sglang/srt/lora/lora_config.py, lora_manager.py (`validate_new_adapter`), lora.py
(`normalize_qkv_proj`, `normalize_gate_up_proj`), utils.py and mem_pool.py (`can_support`,
`load_lora_weight_to_buffer`).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from extend.adapter_format.serving_view import ServingView

REFUSES, WRONG = "refuses", "wrong"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks; 0.11 has no 1
_MAX_NAMED = 3


class Problem(NamedTuple):
    """Why an engine does not serve an adapter as it is.

    Attributes:
        verdict: `refuses` (an error when it is loaded) or `wrong` (it answers, from other weights
            than base plus adapter, and says nothing or warns in its log).
        message: what, with the values.
        remedy: what to do.
    """

    verdict: str
    message: str
    remedy: str


Rule = Callable[[ServingView], Iterator[Problem]]

_MERGE = "merge the adapter with PEFT, or with `extend merge`, and serve the checkpoint"
_CONVERT = "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
_UNIFORM = "write it with one rank and scaling 1 everywhere: `extend doctor DIR --fix --out DIR2`"
_WHOLE = "keep to lora_A and lora_B: `extend extract` puts the rest into its sidecar"
# Config entries under which W + scaling * B A is not the adapted weight.
_VARIANTS = {"lora_bias": "a bias on lora_B", "use_qalora": "QALoRA",
             "alora_invocation_tokens": "activated LoRA", "layer_replication": "copied layers",
             "use_bdlora": "block-diagonal LoRA"}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_SGLANG_MODULES = {  # as get_normalized_target_modules maps them, where buffers are known
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "qkv_proj": "qkv_proj",
    "o_proj": "o_proj", "out_proj": "out_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "gate_up_proj": "gate_up_proj", "down_proj": "down_proj",
    "embed_tokens": "embed_tokens", "lm_head": "lm_head"}


def max_lora_rank(rank: int) -> int | None:
    """The smallest value of vLLM's `--max-lora-rank` that takes `rank`; None above 512."""
    return next((size for size in VLLM_RANKS if size >= max(rank, 8)), None)


def no_rank_limit_holds_it(view: ServingView) -> Iterator[Problem]:
    if max_lora_rank(view.largest_rank) is None:
        yield Problem(REFUSES, f"the largest rank is {view.largest_rank}, above "
                      f"{VLLM_RANKS[-1]}, the largest --max-lora-rank",
                      f"extract with --rank {VLLM_RANKS[-1]} or less")


def dora(view: ServingView) -> Iterator[Problem]:
    if view.config.get("use_dora"):
        yield Problem(REFUSES, "use_dora is true", _MERGE)


def vllm_features(view: ServingView) -> Iterator[Problem]:
    """`_validate_features` of vLLM 0.33."""
    for key, what in _VARIANTS.items():
        if view.config.get(key):
            yield Problem(REFUSES, f"{key} is {view.config[key]!r} ({what})", _MERGE)
    if _changes_base(view.config):
        yield Problem(REFUSES, f"init_lora_weights is {view.config['init_lora_weights']!r}, which "
                      "changed the base", _CONVERT)


def unread_features(view: ServingView) -> Iterator[Problem]:
    """The same keys, where an engine does not look at them."""
    for key, what in _VARIANTS.items():
        if view.config.get(key) and key != "lora_bias":  # its tensors are found by name
            yield Problem(WRONG, f"{key} is {view.config[key]!r} ({what}), which is not read",
                          _MERGE)
    if _changes_base(view.config):
        yield Problem(WRONG, f"init_lora_weights is {view.config['init_lora_weights']!r}, which "
                      "changed the base and is not read", _CONVERT)


def _changes_base(config: Mapping[str, Any]) -> bool:
    init = config.get("init_lora_weights", True)
    return isinstance(init, str) and init.lower() not in _PLAIN_INITS


def vllm_whole_modules(view: ServingView) -> Iterator[Problem]:
    saved = [m for m in view.config.get("modules_to_save") or () if m not in ("classifier",
                                                                              "score")]
    if saved:
        yield Problem(REFUSES, f"modules_to_save is {saved}; only None is taken", _WHOLE)
    if view.config.get("bias", "none") != "none":
        yield Problem(REFUSES, f"bias is {view.config['bias']!r}; only 'none' is taken", _WHOLE)


def vllm_names(view: ServingView) -> Iterator[Problem]:
    """Every tensor must be a factor; a stored copy of the base's vocabulary is passed over."""
    skipped = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
    yield from _strange([name for name in view.others if not name.endswith(skipped)], view)


def vllm_old_names(view: ServingView) -> Iterator[Problem]:
    """A bias of lora_B is read too, but used only with a switch that this program does not give."""
    biases = [name for name in view.others if name.endswith(".lora_B.bias")]
    yield from _strange([name for name in view.others if name not in biases], view)
    if biases:
        yield Problem(WRONG, f"{_listed(biases)} is left out without --enable-lora-bias", _WHOLE)


def _strange(others: Sequence[str], view: ServingView) -> Iterator[Problem]:
    other = [*others, *view.unusual]
    if other:
        yield Problem(REFUSES, f"{_listed(other)} is no lora_A or lora_B", _WHOLE)


def pairs(view: ServingView) -> Iterator[Problem]:
    single = [module for module, pair in view.factors.items() if len(pair) != 2]
    if single:
        yield Problem(REFUSES, f"one factor is missing of {_listed(single)}",
                      "fetch or extract the adapter again")


def vllm_modules(view: ServingView) -> Iterator[Problem]:
    """By the last part of the name a module is let in, by the whole name it is found or not."""
    lost = _lost(view)
    known = {name.rpartition(".")[2] for name in view.base_modules or ()}
    strange = [m for m in lost if known and m.rpartition(".")[2] not in known]
    if strange:
        yield Problem(REFUSES, f"the base has no module like {_listed(strange)}",
                      "serve it on the base it was made for")
    silent = [module for module in lost if module not in strange]
    if silent:
        yield Problem(WRONG, f"the base has no {_listed(silent)}: the base alone would answer",
                      "name tensors base_model.model.<module of the base>.lora_A.weight")


def _lost(view: ServingView) -> list[str]:
    """Modules that the base does not have; without a sidecar, those that no base has."""
    if view.base_modules is not None:
        return [m for m in view.factors if m not in view.base_modules]
    return [m for m in view.factors
            if re.match(r"(model\.model\.|base_model\.|layers\.\d)", m)]


def vocabulary(view: ServingView) -> Iterator[Problem]:
    """As wide as the base's embedding; where there is no sidecar, nothing is known of the base."""
    if view.sidecar is None:
        return
    vocab = view.sidecar.base.vocab_size
    for module, pair in view.factors.items():
        info = pair.get("lora_embedding_A")
        if info is not None and info.shape[1] != vocab:
            yield Problem(REFUSES, f"lora_embedding_A of {module} has {info.shape[1]} columns, the "
                          f"base {vocab} tokens", "serve it on the base it was made for")


def vllm_experts(view: ServingView) -> Iterator[Problem]:
    """One rank for all experts of a projection, and all three projections of every expert."""
    by_block: dict[str, dict[str, dict[int, int]]] = {}
    for (block, projection), ranks in view.experts().items():
        by_block.setdefault(block, {})[projection] = ranks
        if len(set(ranks.values())) > 1:
            yield Problem(REFUSES, f"experts of {block} have ranks {min(ranks.values())} to "
                          f"{max(ranks.values())} in {projection}, not one", _UNIFORM)
    for block, projections in by_block.items():
        count = _num_experts(view, block) or 1 + max(max(r) for r in projections.values())
        gaps = [p for p in ("gate_proj", "up_proj", "down_proj")
                if len(projections.get(p, ())) != count]
        if gaps:
            yield Problem(REFUSES, f"not every one of the {count} experts of {block} is adapted in "
                          f"{', '.join(gaps)}", _UNIFORM)


def _num_experts(view: ServingView, block: str) -> int:
    return sum(m.startswith(f"{block}.experts.") and m.endswith(".down_proj")
               for m in view.base_modules or ())


def no_experts(view: ServingView) -> Iterator[Problem]:
    if view.experts():
        yield Problem(WRONG, "experts are adapted, and this version has no LoRA on them",
                      "serve it with a newer version")


def fused_experts(view: ServingView) -> Iterator[Problem]:
    fused = [m for m in view.factors if re.search(r"\.experts(\.base_layer)*$", m)]
    if fused:
        yield Problem(REFUSES, f"{_listed(fused)} adapts all experts in one tensor; whether that "
                      "loads depends on the model", "adapt experts one by one, or " + _MERGE)


def one_scaling(view: ServingView) -> Iterator[Problem]:
    """lora_alpha / r is taken for every module."""
    taken = view.config["lora_alpha"] / view.config["r"]
    if view.config.get("use_rslora"):
        taken = view.config["lora_alpha"] / math.sqrt(view.config["r"])
    yield from _other_scaling(view, taken)


def one_plain_scaling(view: ServingView) -> Iterator[Problem]:
    """The same, and use_rslora is not read either."""
    yield from _other_scaling(view, view.config["lora_alpha"] / view.config["r"])


def _other_scaling(view: ServingView, taken: float) -> Iterator[Problem]:
    other = [m for m in view.factors if not math.isclose(view.scaling(m), taken)]
    if other:
        yield Problem(WRONG, f"{_listed(other)} is scaled by {view.scaling(other[0]):g} (patterns "
                      f"or use_rslora), but {taken:g} is taken for every module", _UNIFORM)


def sglang_targets(view: ServingView) -> Iterator[Problem]:
    """Names of `target_modules` decide which tensors have a buffer."""
    target = view.config["target_modules"]
    if isinstance(target, str):
        if target not in ("all", "all-linear"):
            yield Problem(REFUSES, f"target_modules is the text {target!r}; only a list, 'all' or "
                          "'all-linear' are taken", "write target_modules as a list of names")
        return
    normalized = {_normal(name) for name in target}
    unknown = sorted(name for name in normalized if name not in _SGLANG_MODULES.values())
    if unknown:
        yield Problem(REFUSES, f"target_modules holds {_listed(unknown)}, for which there are no "
                      "buffers", "leave the module out when extracting, or " + _MERGE)
    missed = [m for m in view.factors if _normal(m) not in normalized]
    for inside, verdict in ((True, REFUSES), (False, WRONG)):
        names = [m for m in missed if (".layers." in f".{m}") is inside]
        if names:
            yield Problem(verdict, f"{_listed(names)} is not among target_modules",
                          "name the module in target_modules")


def _normal(module: str) -> str:
    last = module.rpartition(".")[2]
    return _SGLANG_MODULES.get(last, last)


def sglang_ranks(view: ServingView) -> Iterator[Problem]:
    """Each factor is copied into a buffer of exactly r rows."""
    rank = view.config["r"]
    other = {m: r for m, r in view.ranks.items() if r != rank}
    if other:
        yield Problem(REFUSES, f"r is {rank}, but {len(other)} of {len(view.ranks)} modules have "
                      f"other ranks ({_listed(f'{m}: {r}' for m, r in other.items())}); "
                      "rank_pattern is not read", _UNIFORM)


def sglang_stacks(view: ServingView) -> Iterator[Problem]:
    """k and v are stacked under q, up under gate; what they need must be adapted in that layer."""
    needs = {"k_proj": ("q_proj",), "v_proj": ("q_proj",), "q_proj": ("v_proj",),
             "up_proj": ("gate_proj",)}
    gaps = []
    for module in view.factors:
        prefix, _, last = module.rpartition(".")
        gaps += [f"{prefix}.{need}" for need in needs.get(last, ())
                 if f"{prefix}.{need}" not in view.factors]
    if gaps:
        yield Problem(REFUSES, f"{_listed(sorted(set(gaps)))} is not adapted, but what is stacked "
                      "with it is", _UNIFORM)


def sglang_names(view: ServingView) -> Iterator[Problem]:
    """Tensors of a layer that are no factors break the loading; others are left out."""
    for inside, verdict in ((True, REFUSES), (False, WRONG)):
        names = [n for n in view.others if (".layers." in f".{n}") is inside
                 and not n.endswith(".base_layer.weight")]
        if names:
            yield Problem(verdict, f"{_listed(names)} is no lora_A or lora_B"
                          + ("" if inside else " and is left out"), _WHOLE)


def sglang_tokens(view: ServingView) -> Iterator[Problem]:
    vocab = view.sidecar.base.vocab_size if view.sidecar else 0
    added = [token for token in view.added_tokens if token >= vocab]
    if added:
        yield Problem(REFUSES, f"added_tokens.json adds {len(added)} tokens",
                      "remove the file if the base has these tokens, or " + _MERGE)


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


VLLM: tuple[Rule, ...] = (
    no_rank_limit_holds_it, dora, vllm_features, vllm_whole_modules, vllm_names, pairs,
    vllm_modules, vocabulary, vllm_experts, fused_experts)
VLLM_OLD: tuple[Rule, ...] = (
    no_rank_limit_holds_it, dora, unread_features, vllm_whole_modules, vllm_old_names,
    pairs, vllm_modules, no_experts, fused_experts, one_scaling)
SGLANG: tuple[Rule, ...] = (
    dora, unread_features, sglang_names, pairs, sglang_targets, sglang_ranks, sglang_stacks,
    fused_experts, vocabulary, one_plain_scaling, sglang_tokens)
