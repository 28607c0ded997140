"""Problems that the comparison of readings does not show, or not by their cause."""

from collections.abc import Callable

from extend.checkpoint import Checkpoint
from extend.doctor.decide import Decision
from extend.doctor.families import GEMMA3, family_of
from extend.doctor.files import Patient
from extend.doctor.findings import ERROR, NOTE, WARNING, Finding
from extend.doctor.fix import generation_cap
from extend.doctor.length import length_hints
from extend.doctor.reading import Reading
from extend.model_config import STALE_LENGTH_KEYS

# Rounding of a stored bf16 buffer, with room.
_STORED_TOLERANCE = 2e-2
_NO_WINDOW_IN_GGUF = ("mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def check_generation(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """A length in generation_config.json that stops `generate` early."""
    cap = generation_cap(patient.files.generation_config, decision.max_len)
    if cap is None:
        return []
    return [Finding(
        severity=ERROR, what="generation length",
        readers=("transformers-4.4", "transformers-4", "transformers-5"),
        message=f"generate stops at {cap} tokens, prompt included (generation_config.json "
                f"max_length), of {decision.max_len}",
        remedy="take max_length out of generation_config.json")]


def check_tokenizer(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """A tokenizer that cuts below the model's length."""
    cap = patient.files.tokenizer_config.get("model_max_length")
    if cap is None or cap >= decision.max_len:
        return []
    return [Finding(
        severity=WARNING, what="tokenizer length", readers=("transformers-4", "transformers-5"),
        message=f"the tokenizer warns above {cap:g} tokens, and cuts there when truncation is "
                f"asked for (tokenizer_config.json model_max_length); the model takes "
                f"{decision.max_len}",
        remedy=f"set model_max_length to {decision.max_len} in tokenizer_config.json")]


def check_length(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """One weak hint that `max_position_embeddings` is not meant (two become a question)."""
    if decision.questions:
        return []
    hints = length_hints(patient.files, decision.spec, patient.directory.resolve().name)
    # A tokenizer that takes more than the model is usual and harms nothing.
    hints = [hint for hint in hints if "tokenizer" not in hint]
    return [Finding(
        severity=WARNING, what="max_position_embeddings",
        message=f"max_position_embeddings is {decision.max_len}, but {hint}",
        remedy="check the length; --max-length with --fix writes another") for hint in hints]


def check_window(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """Keys of a sliding window that contradict each other, or limit attention below the length."""
    config, length = patient.files.config, decision.max_len
    window, types = config.get("sliding_window"), config.get("layer_types") or []
    used, sliding = config.get("use_sliding_window"), "sliding_attention" in types
    if types and used is not None and window is not None and bool(used) != sliding:
        return [Finding(
            severity=ERROR, what="sliding window",
            readers=("transformers-4.4", "transformers-4", "transformers-5", "vllm"),
            message=f"use_sliding_window is {str(used).lower()} but layer_types has "
                    f"{'' if sliding else 'no '}sliding_attention: versions that read the one and "
                    "the other mask differently",
            remedy="make both say the same; for full attention: use_sliding_window false, "
                   "sliding_window null, layer_types all full_attention, max_window_layers "
                   "num_hidden_layers")]
    active = window is not None and used is not False and (sliding or not types)
    if not active or window >= length or config.get("model_type") in ("gemma2", GEMMA3):
        return []
    ignored = config.get("model_type") in _NO_WINDOW_IN_GGUF
    return [Finding(
        severity=WARNING, what="sliding window", readers=("llama.cpp",) if ignored else (),
        message=f"layers attend through a window of {window} tokens, below the length {length}"
                + ("; llama.cpp's converter does not write the window for this model" if ignored
                   else ""),
        remedy="if full attention is meant: `extend rescale --sliding-window drop`, or remove the "
               "window's keys")]


def check_stored(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """Rotary frequencies stored in the weights that are not those of the config."""
    if not patient.frequency_tensors or not reference.layers:
        return []
    import torch

    right = torch.tensor(reference.main.short, dtype=torch.float64)
    checkpoint, contradicting = Checkpoint(patient.directory), []
    for name in patient.frequency_tensors:
        stored = checkpoint.read(name).double().flatten()
        if stored.shape != right.shape or not bool(
                ((stored - right).abs() <= _STORED_TOLERANCE * right).all()):
            contradicting.append(name)
    if not contradicting:
        return []
    return [Finding(
        severity=WARNING, what="stored frequencies",
        message=f"{len(contradicting)} tensors such as {contradicting[0]} hold other frequencies "
                "than the config gives; the engines here leave them unread, transformers before "
                "4.32 and some converters do not",
        remedy="write the checkpoint anew without them; `extend rescale` and `extend merge` "
               "do so")]


def check_family(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """A family whose special rules this program does not know."""
    config = patient.files.config
    if family_of(config).known:
        return []
    return [Finding(
        severity=WARNING, what="model_type",
        message=f"model_type {config.get('model_type')!r} is not one whose rules this program "
                "knows; it was read by the generic ones",
        remedy="check the defaults of theta and of the rotated share in the engines you use")]


def check_stale(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """Keys that no reader of this model needs and that some reader may take for the length."""
    config = patient.files.config
    stale = {k: config[k] for k in STALE_LENGTH_KEYS
             if config.get(k) is not None and config[k] != decision.max_len}
    if not stale:
        return []
    listed = ", ".join(f"{key} {value}" for key, value in stale.items())
    return [Finding(
        severity=WARNING, what="stale length keys", message=f"{listed} beside "
        f"max_position_embeddings {config['max_position_embeddings']}",
        remedy="take them out of config.json")]


def check_remarks(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """What was not looked at."""
    return [Finding(severity=NOTE, what="not looked at", message=remark, remedy="")
            for remark in patient.remarks]


def check_adapter(patient: Patient, decision: Decision, reference: Reading) -> list[Finding]:
    """An adapter whose record of the new RoPE is not complete."""
    config = patient.files.config
    missing = [key for key in ("rope_theta", "rope_parameters", "max_position_embeddings")
               if patient.is_adapter and config.get(key) is None]
    return [Finding(
        severity=ERROR, what="sidecar", message=f"the sidecar records no {key}",
        remedy="extract the adapter again with this version") for key in missing]


Check = Callable[[Patient, Decision, Reading], list[Finding]]
CHECKS: tuple[Check, ...] = (check_adapter, check_generation, check_tokenizer, check_length,
                             check_window, check_stored, check_stale, check_family, check_remarks)
