"""What option models are made of: lengths, numbers, paths, and their common base."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "k": 1024, "m": 1024 ** 2}


def parse_length(value: Any) -> int:
    """Read a length in tokens: an integer, or text such as `8192`, `128k`, `1m`.

    Raises:
        ValueError: anything else, or a length below 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", _digits(value))
    length = float(match[1]) * _UNITS[match[2].lower()] if match else 0
    if isinstance(value, bool) or length < 1 or length != int(length):
        raise ValueError(f"{value!r} is not a length in tokens; write 8192, 128k or 1m")
    return int(length)


def _digits(value: Any) -> str:
    """As text, less `_` between digits."""
    return re.sub(r"(?<=\d)_(?=\d)", "", str(value).strip())


def parse_bytes(value: Any) -> int:
    """Read a size: an integer of bytes, or text such as `512MiB`, `180GiB`, `200GB`.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|[KMGT]i?B)", _digits(value), re.IGNORECASE)
    if isinstance(value, bool) or not match:
        raise ValueError(f"{value!r} is not a size; write bytes, or text such as 180GiB")
    unit = match[2].lower()
    power = " kmgt".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if "i" in unit else 1000) ** power)


def parse_number(value: Any) -> Any:
    """Read `2.8e9` and `1e-5`, which YAML 1.1 takes for text, as numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_Count = Annotated[int, Field(ge=1)]
_Size = Annotated[int, Field(ge=0)]
Length = Annotated[int, BeforeValidator(parse_length, json_schema_input_type=(
    _Count | Annotated[str, Field(pattern=r"^[\d_]+(\.\d+)?[kKmM]?$")]))]
Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=(
    _Size | Annotated[str, Field(pattern=r"^[\d_]+(\.\d+)? ?([kKmMgGtT]i?[bB])?$")]))]
Number = Annotated[float, BeforeValidator(parse_number)]
FloatDtype = Literal["float32", "bfloat16", "float16"]
InputPath = Annotated[str, "input path"]
"""A path, or in a recipe the name of an earlier stage; relative paths start at the recipe."""
ModelPath = Annotated[str, "input path", "or Hub id"]
"""A model or adapter: a path as above, or `ORG/NAME[@REVISION]` on the Hub."""


class Options(BaseModel):
    """Base of all option models."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RopeOptions(Options):
    """A RoPE rescaling: a member of `extend.rope.METHODS`, its options and its target."""

    method: str = "critical"
    options: dict[str, Annotated[Any, BeforeValidator(parse_number)]] = {}
    """Keyword-only parameters of the method."""


def _parse_rope(value: Any) -> Any:
    """`auto` as the default method; whatever else is left to the model's own checks."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{value!r} is no RoPE; write auto, or a mapping with method and "
                             "options")
        return {}
    return value


RopeChoice = Annotated[RopeOptions, BeforeValidator(
    _parse_rope, json_schema_input_type=Literal["auto"] | RopeOptions)]
"""A mapping with `method` and `options`, or `auto`: the method that composes over stages."""
