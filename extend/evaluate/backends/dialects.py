"""What kinds of OpenAI-compatible servers take beyond OpenAI's fields, and how each is known.

A server's own default for a field, or the generation config of its model, may hold a penalty or a
sampler that changes what the model writes. Every request therefore sends the neutral value of each
that its server knows. To add a kind: one line in DIALECTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GREEDY: Mapping[str, Any] = {"temperature": 0, "top_p": 1, "frequency_penalty": 0,
                             "presence_penalty": 0}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to speak to one kind of server.

    Attributes:
        fields: sent with each request, beside GREEDY.
        echo: sent beside `echo` and `logprobs` where the prompt's own losses are asked for; None
            where the server has none to give.
        version: path of a JSON object that names the version, and its key; None where there is
            none.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    echo: Mapping[str, Any] | None = field(default_factory=dict)
    version: tuple[str, str] | None = None


# owned_by in GET /v1/models -> its dialect; any other server gets OpenAI's fields alone.
# vLLM: without a value in the request it takes the generation config's (to_sampling_params);
#   `return_token_ids`, `return_tokens_as_token_ids` and echo with ids as prompt are there:
#   vllm/entrypoints/openai/completion/protocol.py @ 002032ee2b18 and serving.py @ 030ea52effcb.
# SGLang: python/sglang/srt/entrypoints/openai/serving_completions.py @ 004c82e07d87.
# llama.cpp: tools/server/server-common.cpp, tokenize_input_subprompt, takes ids as `prompt` (also
#   in /v1/completions) and oaicompat_completion_params_parse refuses echo; server-task.cpp @
#   00efb3e18426, probs_vector_to_json, gives ids as logprobs.content[].id. Its README warns that
#   `cache_prompt` may change results with the size of what is left to read.
DIALECTS: dict[str, Dialect] = {
    "vllm": Dialect({"repetition_penalty": 1.0, "return_token_ids": True},
                    {"return_tokens_as_token_ids": True}, ("/version", "version")),
    "sglang": Dialect({"repetition_penalty": 1.0, "return_token_ids": True}, {},
                      ("/get_server_info", "version")),
    "llamacpp": Dialect({"repeat_penalty": 1.0, "logprobs": 1, "cache_prompt": False}, None,
                        ("/props", "build_info")),
}
