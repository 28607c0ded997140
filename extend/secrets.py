"""Tokens, keys and passwords: what they look like, and text without them.

Whatever is shown or recorded passes here: terminal, logs, errors and their tracebacks, manifests,
pages and cards.
"""

import os
import re
from typing import Any

HIDDEN = "***"
LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)|(?<=://)[^/@\s:]{20,}(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----")
NAMES = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""Of environment variables that hold one."""
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "OPENAI_API_KEY",
              "WANDB_API_KEY")
_LEAST = 8  # characters; a shorter value would blot out words


def hide_secrets(text: str) -> str:
    """The text with what looks like a secret, and the values of known variables, blotted out."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _LEAST:
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(HIDDEN, text)


def without_secrets(data: Any) -> Any:
    """JSON data as `hide_secrets` leaves its texts."""
    if isinstance(data, dict):
        return {without_secrets(key): without_secrets(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_secrets(value) for value in data]
    return hide_secrets(data) if isinstance(data, str) else data
