"""How to load what is published: lines for a card that can be copied and run."""

import json
from collections.abc import Mapping
from typing import Any

from extend.adapter_format.serving_files import ADAPTER_DIR, MODEL_DIR, command_line
from extend.hub import HubId

Lines = tuple[str, str, str]
"""A heading, the language of the code, and the code."""

_ADAPTER = '''\
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

base, revision = {base!r}, {revision!r}
config = AutoConfig.from_pretrained(base, revision=revision)
config.update({override})
model = AutoModelForCausalLM.from_pretrained(base, revision=revision, config=config, dtype="auto")
model = PeftModel.from_pretrained(model, {repo!r}{pin})
tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
'''
_MODEL = '''\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({repo!r}{pin}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({repo!r}{pin})
'''
_MERGE = "extend merge --adapter {repo}{pin} --target YOUR_FINE_TUNE --out DIR"
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


def adapter_lines(repo: str, base: HubId, serving: Mapping[str, Any], tag: str | None,
                  ) -> list[Lines]:
    """How to load an adapter with PEFT, merge it, and serve it.

    Args:
        serving: the adapter's serving.json, with the base's public name.
        tag: of the commit, if it gets one.
    """
    override = _python(serving["rope_override"])
    pin = f", revision={tag!r}" if tag else ""
    code = _ADAPTER.format(base=base.repo, revision=base.revision, override=override, repo=repo,
                           pin=pin)
    merge = _MERGE.format(repo=repo, pin=f"@{tag}" if tag else "")
    return [("With transformers and PEFT; the RoPE is the long model's:", "python", code),
            ("Into a fine-tune of the same base, with everything that a LoRA cannot carry:",
             "sh", merge), *_engines(serving, ADAPTER_DIR, repo, base.revision)]


def model_lines(repo: str, serving: Mapping[str, Any] | None, tag: str | None) -> list[Lines]:
    """How to load a model with transformers, and serve it."""
    pin = f", revision={tag!r}" if tag else ""
    code = _MODEL.format(repo=repo, pin=pin)
    return [("With transformers:", "python", code),
            *(_engines(serving, MODEL_DIR, repo, tag) if serving else [])]


def _engines(serving: Mapping[str, Any], place: str, repo: str,
             revision: str | None = None) -> list[Lines]:
    """Both engines take the commit of the model that they load as --revision."""
    found = []
    for name, heading in _ENGINES.items():
        engine = serving["engines"].get(name, {})
        if not engine.get("command"):
            continue
        verdict, version = engine.get("verdict", "ok"), engine.get("version")
        about = f" (rules of {version}: {verdict})" if version else ""
        command = [part.replace(place, repo) for part in engine["command"]]
        if revision and "--revision" not in command:
            command += ["--revision", revision]
        line = command_line({**engine, "command": command})
        found.append((f"With {heading}{about}:", "sh", line))
    return found


def _python(value: Mapping[str, Any]) -> str:
    """A JSON object as Python writes it."""
    return repr(json.loads(json.dumps(value)))
