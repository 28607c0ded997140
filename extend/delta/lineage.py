"""Is one model a fine-tune of another, how far has it moved, and what follows for a merge?

Three numbers of target against base, over the matrices of the decoder layers: the cosine, the
drift ||T - B|| / ||B||, and the fraction of elements that are equal bit for bit. Gains of norms and
biases are left out of cosine and drift, because gains lie near one in every model: theirs is a
cosine near one between models that share nothing.

How the verdict is cut:

- unrelated: cosine below 0.05, or below four standard deviations of chance. Two independent
  matrices of n elements with mean zero have a cosine of mean 0 and variance 1/n (exactly so when
  either is Gaussian: rotate it so that the other is an axis). Where elements have scales s, alike
  in both, the variance is E[s^4] / (n E[s^2]^2); rows and columns of log-normal scales, spread 0.5
  each, make the factor e^2 = 7.4, so n = 10^6 gives a deviation of 0.0027 and 0.05 is far outside.
  Simulated in tests/delta/test_lineage.py. Of the 210 matrices of SmolLM2-135M-Instruct, none has
  a cosine above 0.014 with the same matrix seven layers on, or above 0.034 with itself once its
  rows or columns are shuffled. What cosine cannot tell: the same model with its neurons in another
  order is unrelated by these numbers, and rightly for a merge, since a delta in the base's order
  means nothing in it.
- other run: cosine^2 < 1/2. The base then explains less than half of the target's energy (cosine^2
  is exactly that share, for the best multiple of the base).
- heavy: drift above 0.1. Where training moves away at a right angle, cosine = 1 / sqrt(1 + drift^2)
  and this is 0.995. The cut is a convention, not a theorem.
- light: below that; same: every element equal.

Rows of embedding and head share a mean direction: SmolLM2's embedding keeps a cosine of 0.45 with
itself when its rows are shuffled. So a vocabulary counts as another one below the cosine of "other
run" already.

A kind of matrix (`mlp.up_proj`) or a layer that is unrelated where the rest is not makes it
"unrelated in part": neurons in another order, or layers taken from elsewhere.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from extend.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from extend.delta.moments import Moments, require_finite, whole_moments
from extend.delta.pair import in_layer_order, is_vocabulary, layer_of
from extend.errors import CompatibilityError

UNRELATED = 0.05  # cosine
CHANCE = 4.0  # standard deviations of the cosine of unrelated matrices
OTHER_RUN = math.sqrt(0.5)  # cosine
HEAVY = 0.1  # drift

VERDICTS = {
    "same": ("the same weights as the base",
             "a merge gives the adapter's own long model"),
    "light": ("a light fine-tune of the base",
              "the delta was trained close to it: merge at weight 1"),
    "heavy": ("a heavily tuned one",
              "the delta was trained that far away: try weights below 1 or --method drift-aware, "
              "and evaluate skill and context of the result"),
    "other-run": ("same family, other run: more than half of its weights' energy is not the base's",
                  "a merge is likely to cost it skill: better extract from its own base, or "
                  "evaluate with care"),
    "part": ("unrelated in part",
             "the delta is noise to those matrices (neurons in another order, or trained from "
             "another initialisation), and merge refuses it"),
    "unrelated": ("unrelated: trained from another initialisation, or its neurons lie in another "
                  "order",
                  "the delta is noise to it, and merge refuses it")}
"""kind -> what the target is, and what that means for a merge."""
REFUSED = ("part", "unrelated")
WARNED = ("heavy", "other-run")


@dataclass(frozen=True)
class Lineage:
    """A target beside its base.

    Attributes:
        tensors: parameter -> its moments, over the rows that both have.
        matrices: those of `tensors` that are matrices of a decoder layer.
        resized: vocabulary tensor -> rows of the base, rows of the target.
        only_base, only_target: parameters that one of the two does not have.
        sampled: whether the moments are estimates.
    """

    tensors: Mapping[str, Moments]
    matrices: frozenset[str]
    resized: Mapping[str, tuple[int, int]]
    only_base: tuple[str, ...]
    only_target: tuple[str, ...]
    sampled: bool

    def part(self, names: Iterable[str]) -> Moments:
        """The moments of several parameters together."""
        return Moments.total(self.tensors[name] for name in names)

    @property
    def overall(self) -> Moments:
        """The moments of all matrices of the layers."""
        return self.part(self.matrices)

    @property
    def everything(self) -> Moments:
        """The moments of all parameters; for the fraction of equal elements."""
        return Moments.total(self.tensors.values())

    def layers(self) -> dict[int, list[str]]:
        """Layer -> its parameters, in order."""
        found: dict[int, list[str]] = {}
        for name in in_layer_order(self.tensors):
            layer = layer_of(name)
            if layer is not None:
                found.setdefault(layer, []).append(name)
        return found

    def unrelated_parts(self) -> list[str]:
        """Kinds of matrices, then layers, whose own cosine is that of unrelated ones."""
        groups: dict[str, list[str]] = {}
        for name in in_layer_order(self.matrices):
            groups.setdefault(_role(name), []).append(name)
        for layer, names in self.layers().items():
            groups[f"layer {layer}"] = [name for name in names if name in self.matrices]
        return [label for label, names in groups.items()
                if names and is_unrelated(self.part(names))]

    @property
    def kind(self) -> str:
        """One of `VERDICTS`."""
        if is_unrelated(self.overall):
            return "unrelated"
        if self.unrelated_parts():
            return "part"
        if self.overall.cosine().value < OTHER_RUN:
            return "other-run"
        if self.overall.drift().value > HEAVY:
            return "heavy"
        whole = self.everything
        same = whole.equal == whole.elements and not (
            self.resized or self.only_base or self.only_target)
        return "same" if same else "light"

    def vocabulary(self) -> str | None:
        """What is special about the rows of embedding and head, in words; None if nothing is."""
        notes = [f"{name} has {target} rows, the base's {base}"
                 for name, (base, target) in self.resized.items()]
        notes += [f"the rows of {name} are not the base's (cosine {cosine.text(3)}): another "
                  "tokenizer, or trained anew" for name, moments in self.tensors.items()
                  if is_vocabulary(name) and (cosine := moments.cosine()) is not None
                  and cosine.value < OTHER_RUN]
        return "; ".join(notes) or None

    def verdict(self) -> str:
        """What the target is, with the numbers, in a sentence or two."""
        cosine, drift = self.overall.cosine(), self.overall.drift()
        text = (f"{VERDICTS[self.kind][0]} (cosine {cosine.text(6)}, drift {drift.text(3)}, "
                f"{_percent(self.everything)} of the elements equal)")
        parts = self.unrelated_parts() if self.kind == "part" else []
        if parts:
            more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
            text += f"; unrelated are {', '.join(parts[:6])}{more}"
        return "; ".join(filter(None, [text, self.vocabulary()]))

    def summary(self) -> dict[str, Any]:
        """The verdict and the overall numbers, for a manifest."""
        return {"kind": self.kind, "verdict": self.verdict(), "sampled": self.sampled,
                **numbers(self.overall, self.everything)}


def is_unrelated(moments: Moments) -> bool:
    """Whether a cosine is small, or within what chance and sampling give; not for all zeros."""
    cosine = moments.cosine()
    if cosine is None:
        return False
    chance = math.sqrt(1 / moments.elements + moments.cosine_error() ** 2)
    return cosine.value < max(UNRELATED, CHANCE * chance)


def numbers(matrices: Moments, everything: Moments) -> dict[str, Any]:
    """cosine and drift of `matrices`, equal fraction of `everything`: {value, low, high} each."""
    found = {"cosine": matrices.cosine(), "drift": matrices.drift(),
             "equal": everything.equal_fraction()}
    return {key: value and value._asdict() for key, value in found.items()}


def compare(base: Checkpoint, base_infos: Mapping[str, TensorInfo], target: Checkpoint,
            target_infos: Mapping[str, TensorInfo]) -> Lineage:
    """Measure a target against its base, tensor by tensor; memory is bounded by blocks.

    Args:
        base_infos, target_infos: the `parameter_infos` of each.

    Raises:
        CheckpointError: infinite or NaN values.
        CompatibilityError: as `match`.
    """
    where = f"{base.directory} or {target.directory}"

    def measure(name: str, shape: tuple[int, ...]) -> Moments:
        moments = whole_moments(*(_common(files.read(name), shape) for files in (base, target)))
        require_finite(moments, name, where)
        return moments

    shared = match(base_infos, target_infos, str(base.directory), str(target.directory))
    return collect(shared, base_infos, target_infos,
                   {name: measure(name, shape) for name, shape in shared.items()}, sampled=False)


def match(base: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo], base_label: str,
          target_label: str) -> dict[str, tuple[int, ...]]:
    """Parameters of both, in layer order -> the shape of what they have in common.

    The vocabulary may have other numbers of rows: those in common are compared by position.

    Raises:
        CompatibilityError: another shape, values that are no floating-point numbers, or no matrix
            of a decoder layer in common.
    """
    shared = {}
    for name in in_layer_order(base.keys() & target.keys()):
        b, t = base[name], target[name]
        for info, label in ((b, base_label), (t, target_label)):
            if info.dtype not in FLOAT_DTYPES:
                raise CompatibilityError(f"{label}: tensor {name} is {info.dtype}, which cannot be "
                                         "compared; dequantize the model first")
        if b.shape != t.shape and not (is_vocabulary(name) and b.shape[1:] == t.shape[1:]):
            raise CompatibilityError(
                f"tensor {name}: shape {list(b.shape)} in {base_label} but {list(t.shape)} in "
                f"{target_label}; the two are of other sizes, so neither is a fine-tune of the "
                "other")
        shared[name] = (min(b.shape[0], t.shape[0]), *b.shape[1:]) if b.shape else ()
    if not any(is_matrix(name, shape) for name, shape in shared.items()):
        raise CompatibilityError(f"{base_label} and {target_label} have no matrix of a decoder "
                                 "layer in common; give two models of one family")
    return shared


def collect(shared: Mapping[str, tuple[int, ...]], base: Mapping[str, Any],
            target: Mapping[str, Any], moments: Mapping[str, Moments], *,
            sampled: bool) -> Lineage:
    """A `Lineage` of the moments of `shared`; `base` and `target` map names to infos."""
    resized = {name: (base[name].shape[0], target[name].shape[0]) for name in shared
               if base[name].shape != target[name].shape}
    found = Lineage(tensors=moments, resized=resized, sampled=sampled,
                    matrices=frozenset(n for n, shape in shared.items() if is_matrix(n, shape)),
                    only_base=tuple(in_layer_order(base.keys() - target.keys())),
                    only_target=tuple(in_layer_order(target.keys() - base.keys())))
    if found.overall.cosine() is None:
        raise CompatibilityError("every matrix of the decoder layers is zero in the base or in the "
                                 "target, as in no trained model; see that their files are whole")
    return found


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix of a decoder layer, or several of them in one tensor."""
    return len(shape) > 1 and layer_of(name) is not None


def _common(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return x[:shape[0]] if shape else x


def _role(name: str) -> str:
    """A matrix's name within its layer, without the number of an expert."""
    inside = re.split(r"(?:^|\.)layers\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+\.", ".*.", inside).removesuffix(".weight")


def _percent(moments: Moments) -> str:
    found = moments.equal_fraction()
    return f"{100 * found.value:.3g} %" if found is not None else "none"
