"""What is wrong: where readings differ from the reference, and which keys make them differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extend.doctor.limits import limit_remedy
from extend.doctor.readers import READERS
from extend.doctor.reading import FULL, LayerRope, Reading

ERROR, WARNING, NOTE = "error", "warning", "note"
_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem.

    Attributes:
        severity: `error` (engines compute different things, or none the right one), `warning`
            (an old version does, or something to look at) or `note`.
        what: the quantity or key in question.
        readers: the engines it concerns.
        message: what they do, with both values and their keys.
        remedy: what to change.
        avoidable: False where no configuration makes these readers agree.
    """

    severity: str
    what: str
    readers: tuple[str, ...] = ()
    message: str
    remedy: str
    avoidable: bool = True

    def to_json(self) -> dict[str, Any]:
        return {"severity": self.severity, "what": self.what, "readers": list(self.readers),
                "message": self.message, "remedy": self.remedy, "avoidable": self.avoidable}


def compare(readings: Sequence[Reading], reference: Reading, portable: Sequence[Reading],
            changes: Mapping[str, str]) -> list[Finding]:
    """One finding for each quantity and way in which readings differ from `reference`.

    Args:
        readings: of the files as they are.
        reference: the reading that is right.
        portable: of the files as a fix would write them, by the same readers. A difference that
            is there as well cannot be avoided by any key.
        changes: what a fix would change, `file: key` to `before -> after`.
    """
    after = {reading.reader: reading for reading in portable}
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for reading in readings:
        for what, message in differences(reading, reference).items():
            avoidable = reading.reader not in after or _changes(what, reading,
                                                                after[reading.reader])
            groups.setdefault((what, message, avoidable), []).append(reading.reader)
    return [_finding(what, message, avoidable, readers, reference, changes)
            for (what, message, avoidable), readers in groups.items()]


def _changes(what: str, before: Reading, after: Reading) -> bool:
    """Whether a reader has another value of the quantity `what` in the portable form."""
    quantity, _, layer = what.partition(" of ")
    if not (before.layers and after.layers):
        return bool(before.refusal) and bool(after.layers)
    if quantity == "maximum length":
        return before.max_len != after.max_len
    mine, new = (r.layers.get(layer or FULL) or r.main for r in (before, after))
    return not (mine.same_attention(new) if quantity == "attention factor"
                else mine.same_frequencies(new))


def differences(reading: Reading, reference: Reading) -> dict[str, str]:
    """Quantity to message, for all that `reading` has otherwise than `reference`."""
    if reading.refusal:
        return {"loading": f"would not load it: {reading.refusal}"}
    if reading.unknown or reference.refusal or reference.unknown:
        return {}
    found = {}
    for name, right in reference.layers.items():
        # An engine that knows one RoPE only gives it to all layers.
        mine = reading.layers.get(name) or reading.main
        suffix = "" if name == FULL else f" of {name}"
        multiplies = "" if mine.same_attention(right) else (
            f"multiplies cos and sin by {mine.attention_factor:.7g} instead of "
            f"{right.attention_factor:.7g}")
        if not mine.same_frequencies(right):
            message = _frequency_message(mine, right, reading, reference)
            if multiplies and mine.parameters["rope_type"] != right.parameters["rope_type"]:
                message, multiplies = f"{message}; {multiplies}", ""  # one follows from the other
            found[f"frequencies{suffix}"] = message
        if multiplies:
            found[f"attention factor{suffix}"] = multiplies
    if reading.max_len != reference.max_len:
        found["maximum length"] = (
            f"takes {reading.max_len} tokens ({reading.origin['max_len']}) instead of "
            f"{reference.max_len} ({reference.origin['max_len']})")
    return found


def _frequency_message(mine: LayerRope, right: LayerRope, reading: Reading,
                       reference: Reading) -> str:
    parts, layer = [], _layer_of(mine, reading)
    other_type = mine.parameters["rope_type"] != right.parameters["rope_type"]
    for key in dict.fromkeys((*mine.parameters, *right.parameters)):
        used, wanted = mine.parameters.get(key), right.parameters.get(key)
        # What only one of two types has says no more than that they are two.
        if key == "positions" or _same(used, wanted) or (other_type and None in (used, wanted)):
            continue
        parts.append(f"{key} {show(used)} ({_origin(reading, key, layer)}) instead of "
                     f"{show(wanted)} ({_origin(reference, key, _layer_of(right, reference))})")
    where = [layer.parameters.get("positions", "one by one") for layer in (mine, right)]
    if where[0] != where[1]:
        parts.append(f"positions counted {where[0]} instead of {where[1]}")
    return "computes with " + "; ".join(parts or [_switch_message(mine, right)])


def _switch_message(mine: LayerRope, right: LayerRope) -> str:
    """The same parameters, but other lengths at which they count."""
    if mine.short != mine.long:
        return "frequencies chosen by the length of a sequence"
    if mine.short == right.short:
        return "the frequencies of short sequences at every length"
    return "the frequencies of long sequences at every length"


def _layer_of(rope: LayerRope, reading: Reading) -> str:
    return next((name for name, layer in reading.layers.items() if layer is rope), FULL)


def _origin(reading: Reading, key: str, layer: str) -> str:
    key = "partial_rotary_factor" if key == "rotary_dim" else key
    return reading.origin.get(key if layer == FULL else f"{layer}.{key}", "not read")


def _same(used: Any, wanted: Any) -> bool:
    if isinstance(used, int | float) and isinstance(wanted, int | float):
        return math.isclose(used, wanted, rel_tol=1e-12)
    return used == wanted


def show(value: Any) -> str:
    """A value for a message, cut short."""
    text = "nothing" if value is None else f"{value:g}" if isinstance(value, float) and (
        value == int(value) and abs(value) < 1e6) else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN - 3] + "..."


def _finding(what: str, message: str, avoidable: bool, readers: list[str], reference: Reading,
             changes: Mapping[str, str]) -> Finding:
    current = any(READERS[name].current for name in readers)
    severity = ERROR if avoidable or current else WARNING
    if avoidable:
        remedy = _change(what, message, changes)
    else:
        remedy = limit_remedy(what, readers, reference)
    return Finding(severity=severity, what=what, readers=tuple(readers), message=message,
                   remedy=remedy, avoidable=avoidable)


def _change(what: str, message: str, changes: Mapping[str, str]) -> str:
    """Which of the keys that a fix would change can have made readers differ in `what`."""
    if not changes:
        return "decide what is asked below; --fix then writes the form that all read alike"
    keys = [name.split(": ") for name in changes]
    if what == "maximum length":
        wanted = [pair for pair in keys if pair[1] in message] or keys
    else:
        about_rope = ("rope", "rotary", "partial", "original")
        wanted = [pair for pair in keys if pair[1].startswith(about_rope)] or keys
    files = dict.fromkeys(file for file, _ in wanted)
    listed = " and ".join(f"{', '.join(key for f, key in wanted if f == file)} in {file}"
                          for file in files)
    return f"change {listed} (values below; --fix writes them)"


def same_reading(one: Reading, other: Reading) -> bool:
    """Whether two engines compute the same at the same length."""
    return not differences(one, other) and not differences(other, one)


def agreement(readings: Sequence[Reading]) -> list[list[str]]:
    """Names of readers that compute the same, one list for each way of reading."""
    groups: list[tuple[Reading, list[str]]] = []
    for reading in readings:
        if reading.refusal or reading.unknown:
            continue
        for first, names in groups:
            if same_reading(reading, first):
                names.append(reading.reader)
                break
        else:
            groups.append((reading, [reading.reader]))
    return sorted((names for _, names in groups), key=len, reverse=True)
