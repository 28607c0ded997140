"""A typed view of an HF `config.json`, and the one place that reads and writes RoPE keys.

Imports neither torch nor transformers.
"""

from extend.model_config.config import ModelConfig, parse_config, read_config, read_json
from extend.model_config.rope_read import NATIVE_KEY_TYPES, read_rope
from extend.model_config.rope_spec import (
    RopeSpec,
    depends_on_length,
    longrope_mscale,
    yarn_mscale,
)
from extend.model_config.rope_write import STALE_LENGTH_KEYS, write_rope

__all__ = ["NATIVE_KEY_TYPES", "STALE_LENGTH_KEYS", "ModelConfig", "RopeSpec", "depends_on_length",
           "longrope_mscale", "parse_config", "read_config", "read_json", "read_rope",
           "write_rope", "yarn_mscale"]
