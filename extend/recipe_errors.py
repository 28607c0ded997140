"""What pydantic finds wrong with the options of a stage, in words that help."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from extend.recipe_text import Location, dotted
from extend.registry import suggest


def explain(error: ValidationError, model: type[BaseModel],
            kind: str) -> Iterator[tuple[Location, str]]:
    """Yield (location, message) of everything that `model`, the options of a `kind`, refused."""
    for item in error.errors(include_url=False):
        location = tuple(item["loc"])
        field = dotted(location) or kind
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            message = (f"{field}: unknown key;{suggest(str(location[-1]), known)} "
                       f"{kind} accepts {', '.join(known)}")
        elif item["type"] == "missing":
            message = f"{field}: is missing"
        else:
            message = f"{field}: {item['msg'].removeprefix('Value error, ')}"
            if location and not isinstance(item["input"], dict | list):
                message += f" (it is {item['input']!r})"
            message += _hint(item)
        yield location, message


def _hint(item: Any) -> str:
    """What was probably meant, where pydantic names what it would take."""
    context = item.get("ctx", {})
    names = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags")))
    hint = suggest(str(context.get("tag", item["input"])), names)
    return hint and f";{hint}"


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """The field names of the option model that `location` leads to."""
    for part in location:
        candidates = _models_in(model.model_fields[part].annotation) \
            if part in model.model_fields else []
        by_kind = [m for m in candidates if _kind_of(m) in location]
        model = (by_kind or candidates or [model])[0]
    return list(model.model_fields)


def _kind_of(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", [None])[0] if field else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
