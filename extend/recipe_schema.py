"""The JSON Schema of recipes, made from the option models: editors check and complete by it.

Its rules are those of single values. What two values say together is checked when a recipe is
loaded.
"""

from typing import Any

from extend.options import STAGES

_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]*$",
         "description": "Also the name of its directory, and how later stages refer to it."}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a whole recipe."""
    definitions: dict[str, Any] = {}
    for kind, model in STAGES.items():
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        definitions[kind] = _stage(kind, schema)
    for schema in definitions.values():
        _name_members(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of extend", "type": "object", "additionalProperties": False,
        "required": ["stages"],
        "properties": {
            "name": {"type": "string"},
            "seed": {"type": "integer", "description": "Of every stage that has none of its own."},
            "stages": {"type": "array", "minItems": 1, "items": _any_stage()}},
        "$defs": _without_titles(definitions)}


def _any_stage() -> dict[str, Any]:
    """By its `stage`, so that an editor tells what is wrong with this one and not with all."""
    return {"type": "object", "required": ["name", "stage"],
            "properties": {"name": _NAME, "stage": {"enum": list(STAGES)}},
            "allOf": [{"if": {"properties": {"stage": {"const": kind}}, "required": ["stage"]},
                       "then": {"$ref": f"#/$defs/{kind}"}} for kind in STAGES]}


def _stage(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": _NAME, "stage": {"const": kind}, **schema["properties"]}
    return {**schema, "title": kind, "properties": properties}


def _without_titles(schema: Any) -> Any:
    """Less the titles that pydantic makes of names; a key `title` of a stage stays."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_titles(value) for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))}


def _name_members(schema: dict[str, Any]) -> None:
    """Name the members of the families that a key chooses from."""
    from extend.merge.methods import MERGEKIT_PREFIX
    from extend.merge.methods import METHODS as MERGE_METHODS
    from extend.rope.methods import METHODS

    properties, title = schema.get("properties", {}), schema.get("title")
    if title in ("rescale", "RopeOptions"):
        properties["method"]["enum"] = list(METHODS)
    if title == "merge":
        method = properties["method"]
        method["anyOf"] = [{"enum": list(MERGE_METHODS)}, {"pattern": f"^{MERGEKIT_PREFIX}"}]
    if title == "eval":
        properties["tasks"]["items"] = _tasks()


def _tasks() -> dict[str, Any]:
    from extend.evaluate.tasks import GROUPS, TASKS

    names = {"enum": [*TASKS, *GROUPS]}
    return {"anyOf": [names, {"type": "object", "required": ["task"],
                              "properties": {"task": names}}]}
