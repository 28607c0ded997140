"""What to do where no config.json can make an engine agree."""

from collections.abc import Sequence

from extend.doctor.reading import Reading


def limit_remedy(what: str, readers: Sequence[str], reference: Reading) -> str:
    """Advice for a difference that stays in the portable form.

    Args:
        what: the quantity, as in `Finding.what`.
        readers: the engines that differ.
        reference: the reading they should have.
    """
    if what == "loading" or not reference.layers:
        return ("give the entry that is missing or wrong, or leave out with --readers the engines "
                "that do not know this RoPE")
    kind, length = reference.main.parameters["rope_type"], reference.max_len
    if what == "maximum length":
        flags = {"vllm": f"--max-model-len {length}", "vllm-old": f"--max-model-len {length}",
                 "sglang": f"--context-length {length}"}
        used = sorted({f"{name} with {flags[name]}" for name in readers if name in flags})
        return f"no key prevents it; start {' and '.join(used)}" if used else _OTHER
    if kind == "dynamic":
        return ("dynamic has no form that all engines compute alike; give the model a fixed theta "
                "instead: `extend rescale --method ntk` or `critical`")
    if reference.main.short != reference.main.long and what.startswith("frequencies"):
        return ("engines switch between two lists at different lengths, or not at all; give "
                "short_factor and long_factor the same numbers, or use one engine only")
    if set(readers) == {"transformers-4.4"}:
        return "no key prevents it; use transformers 4.57 or newer"
    if "llama.cpp" in readers:
        return _LLAMA_CPP.get(kind if what.startswith("frequencies") else what, _OTHER)
    return _OTHER


_OTHER = ("no key prevents it; use another engine, or another method of `extend rescale` (those "
          "that change theta alone are read alike everywhere)")
_LLAMA_CPP = {
    "llama3": "llama.cpp has rope_type llama3 for Llama and Mistral only; use a method that "
              "changes theta alone (ntk, critical), or yarn",
    "longrope": "llama.cpp's converter writes the factors of longrope for Phi-3 only; use a method "
                "that changes theta alone (ntk, critical), or yarn",
    "proportional": "llama.cpp has no rope_type proportional for this model; use a method that "
                    "changes theta alone (ntk, critical), or yarn",
    "yarn": "llama.cpp always rounds the ends of YaRN's ramp to whole pairs; leave truncate true",
    "attention factor": "llama.cpp always takes 0.1 ln(factor) + 1; leave attention_factor at its "
                        "default",
}
