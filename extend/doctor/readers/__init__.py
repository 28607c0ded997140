"""The engines, each as a pure function of the three files that decide how it reads a checkpoint.

To add one: a function `(files) -> (layers, max_len, origin)` in a module here that raises
`Refused` where the engine would not load and `Unknown` where its rule was not looked up; one line
in `READERS`; one test.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from extend.doctor.readers.llama_cpp import read_llama_cpp
from extend.doctor.readers.sglang import read_sglang
from extend.doctor.readers.transformers_4 import read_transformers_4, read_transformers_4_old
from extend.doctor.readers.transformers_5 import read_transformers_5
from extend.doctor.readers.vllm import read_vllm, read_vllm_old
from extend.doctor.reading import LayerRope, ModelFiles, Reading, Refused, Unknown

Read = Callable[[ModelFiles], tuple[Mapping[str, LayerRope], int, Mapping[str, str]]]


class Reader(NamedTuple):
    """One engine.

    Attributes:
        read: its rules.
        about: what it stands for, in a few words.
        current: False for rules that a newer version has replaced. What no config.json can make
            such a version do is a warning, not an error.
    """

    read: Read
    about: str
    current: bool = True


def read_with(name: str, files: ModelFiles) -> Reading:
    """What the engine `name` makes of `files`."""
    try:
        layers, max_len, origin = READERS[name].read(files)
    except Refused as reason:
        return Reading(reader=name, refusal=str(reason))
    except Unknown as reason:
        return Reading(reader=name, unknown=str(reason))
    return Reading(reader=name, layers=layers, max_len=max_len, origin=origin)


READERS: dict[str, Reader] = {
    "transformers-4.4": Reader(read_transformers_4_old, "transformers 4.4x: YaRN counts turns in "
                               "max_position_embeddings", current=False),
    "transformers-4": Reader(read_transformers_4, "transformers 4.57"),
    "transformers-5": Reader(read_transformers_5, "transformers 5"),
    "vllm-old": Reader(read_vllm_old, "vLLM on transformers 4 (0.10)", current=False),
    "vllm": Reader(read_vllm, "vLLM on transformers 5, from September 2026"),
    "sglang": Reader(read_sglang, "SGLang on transformers 5"),
    "llama.cpp": Reader(read_llama_cpp,
                        "convert_hf_to_gguf.py on transformers 5, then the run time"),
}
