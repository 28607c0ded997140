"""What files of strangers may hold: a bounded size, JSON and YAML that mean one thing, and names
that stay in their directory.

Checkpoints, adapters, recipes, manifests and listings are all read through these few functions.
"""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a while to load, which the command line's help has no use for
    import yaml

MAX_JSON_BYTES = 2**29  # a tokenizer.json of 256 thousand tokens has 2**25
MAX_JSON_DEPTH = 100
MAX_YAML_BYTES = 2**18
MAX_YAML_DEPTH = 40
MAX_YAML_ALIASES = 100
_MAX_NAME_BYTES = 255
_MERGE = "tag:yaml.org,2002:merge"


def read_bounded(path: Path, most_bytes: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a plain file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe, a device or too large, or no UTF-8.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(21, "Is a directory")
        raise ValueError("it is a pipe or a device, not a file")
    if state.st_size > most_bytes:
        raise ValueError(f"it has {state.st_size:,} bytes; at most {most_bytes:,} are read")
    with path.open("rb") as file:
        return file.read(most_bytes).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON in which no key stands twice, nothing is nested without end, and all text is text.

    Raises:
        ValueError: what is wrong; `json.JSONDecodeError` where it is no JSON at all.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    _check_depth(data)
    escaped = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if escaped in text.lower():  # type: ignore[operator]  # a half of a character, perhaps
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:100]!r} is given twice")
    return found


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH + 1:
            raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
        level = [item for value in level if isinstance(value, dict | list)
                 for item in (value.values() if isinstance(value, dict) else value)
                 if isinstance(item, dict | list)]


def load_yaml(text: str, loader: "type[yaml.SafeLoader] | None" = None) -> Any:
    """YAML as data, once `yaml_problems` finds nothing in it.

    Raises:
        ValueError: not YAML, or YAML that is refused.
    """
    import yaml

    loader = loader or yaml.SafeLoader
    try:
        for problem, line in yaml_problems(text, loader):
            raise ValueError(f"line {line}: {problem}")
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, TypeError,
            OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def yaml_problems(text: str, loader: "type[yaml.SafeLoader]") -> Iterator[tuple[str, int]]:
    """(what, line) of what YAML allows and nobody needs: found before anything is built of it.

    An alias inside an anchored block could hold itself, or grow without bound. A tag asks for an
    object of a kind. Text that is too long, nested too deep or made of aliases takes time.

    Raises:
        yaml.YAMLError: not YAML.
    """
    import yaml

    if len(text.encode("utf-8", "surrogatepass")) > MAX_YAML_BYTES:
        yield f"more than {MAX_YAML_BYTES:,} bytes of YAML", 1
        return
    anchored: list[bool] = []
    aliases = 0
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if any(anchored):
                yield f"alias *{event.anchor} inside an anchored block", line
            if aliases == MAX_YAML_ALIASES + 1:
                yield f"more than {MAX_YAML_ALIASES} aliases", line
        elif isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None)
            if len(anchored) == MAX_YAML_DEPTH + 1:
                yield f"nested deeper than {MAX_YAML_DEPTH} levels", line
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()
        if getattr(event, "tag", None) not in (None, _MERGE):
            yield f"the tag {event.tag}; values are written without one", line


def name_problem(name: Any) -> str | None:
    """Why a name that a file gives cannot be that of a file beside it; None if it can."""
    if not isinstance(name, str) or not name or name in (".", ".."):
        return "is not a file name in this directory"
    if "/" in name or "\\" in name:
        return "is not a file name in this directory"
    if not name.isprintable():
        return "holds characters that do not belong in a file name"
    if len(name.encode("utf-8")) > _MAX_NAME_BYTES:
        return f"is longer than the {_MAX_NAME_BYTES} bytes of a file name"
    return None


def path_problem(path: Any) -> str | None:
    """As `name_problem`, of a relative path with `/` between names."""
    if not isinstance(path, str):
        return "is not the name of a file"
    return next((problem for name in path.split("/") if (problem := name_problem(name))),
                None if len(path) < 4096 else "is longer than a path may be")


def link_problem(path: Path, home: Path) -> str | None:
    """Why a file is not one of the directory `home`: it is a link that leads out of it.

    In the Hub's cache, where all files are links, a repository's whole folder is the home.
    """
    place, root = path.resolve(), home.resolve()
    cache = next((parent for parent in root.parents if parent.name.startswith("models--")), root)
    if place.is_relative_to(root) or (cache != root and place.is_relative_to(cache)):
        return None
    return f"is a link that leads out of {home}, to {place}"
