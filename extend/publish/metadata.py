"""The card's metadata: what the Hub sorts and links by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.errors import RecipeError
from extend.hub import HubId, explaining, hub_api
from extend.publish.provenance import ADAPTER, RESULTS
from extend.results import Results, format_length
from extend.untrusted import load_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# What the stage that wrote a model makes of it; all others fine-tune.
_RELATIONS = {"merge": "merge"}
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, slots=True)
class Terms:
    """Licence and language; `source` says where they come from."""

    license: str | None
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    source: str = "as given"


def settle_terms(given: Mapping[str, Any], base: HubId | None, path: str | None, *,
                 online: bool) -> Terms:
    """The licence and language that were given, else those of the base's card.

    Args:
        given: options by name: license, license_name, license_link, language.
        base: repository of the base.
        path: directory of the base, whose README.md is read first; it may be gone.
        online: whether the Hub may be asked for the base's card.

    Raises:
        RecipeError: a licence of an unknown form, or `other` without its name and link; or, when
            the Hub was asked, none is known.
        HubError: the base cannot be asked about.
    """
    if given.get("license"):
        inherited, source = {}, "as given"
        if given.get("language") is None and path:
            inherited = {"language": read_front(Path(path)).get("language")}
    else:
        inherited, source = _card_of(base, path, online)
    values = {key: given.get(key) or inherited.get(key) for key in _INHERITED}
    language = values["language"] or []
    terms = Terms(values["license"], values["license_name"],
                  _absolute(values["license_link"], base), source=source,
                  language=[language] if isinstance(language, str) else list(language))
    _check(terms, online, base)
    return terms


def _card_of(base: HubId | None, path: str | None, online: bool) -> tuple[Mapping[str, Any], str]:
    front = read_front(Path(path)) if path else {}
    if front.get("license"):
        return front, f"that of {base or 'the base'}"
    if base is None or not online:
        return front, "unknown"
    with explaining(base.repo, "read the card of the base"):
        info = hub_api().model_info(base.repo, revision=base.revision)
    return (info.card_data.to_dict() if info.card_data else {}), f"that of {base.repo}"


def read_front(directory: Path) -> dict[str, Any]:
    """The metadata of a directory's README.md; nothing where there is none."""
    card = directory / "README.md"
    found = _FRONT.match(card.read_text(encoding="utf-8", errors="replace")) \
        if card.is_file() else None
    try:
        front = load_yaml(found[1]) if found else {}
    except ValueError:
        return {}
    return front if isinstance(front, dict) else {}


def _absolute(link: str | None, base: HubId | None) -> str | None:
    """A link that was relative to the base's repository."""
    if link is None or base is None or re.match(r"\w+://", link):
        return link
    return f"https://huggingface.co/{base.repo}/blob/main/{link}"


def _check(terms: Terms, online: bool, base: HubId | None) -> None:
    if terms.license is None:
        if online:
            why = f"the card of {base.repo} names none" if base else "it has no base to ask"
            raise RecipeError(f"no licence is known: {why}; give --license, such as apache-2.0, or "
                              "other with --license-name and --license-link")
        return
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", terms.license):
        raise RecipeError(f"the license {terms.license!r} is no identifier of the Hub's; give one "
                          "such as apache-2.0, or other with --license-name and --license-link")
    if terms.license == "other" and not (terms.license_name and terms.license_link):
        raise RecipeError(f"the license other has the name {terms.license_name} and the link "
                          f"{terms.license_link}; give both --license-name and --license-link")


def relation_of(kind: str, stage: str) -> str:
    """base_model_relation: what the published thing is to its base models."""
    return ADAPTER if kind == ADAPTER else _RELATIONS.get(stage, "finetune")


def card_data(kind: str, repo: str, terms: Terms, bases: Sequence[HubId], relation: str,
              tags: Sequence[str], results: Sequence["EvalResult"]) -> Any:
    """The metadata as huggingface_hub writes it.

    Source: hub-docs, modelcard.md; huggingface_hub, repocard_data.py.
    """
    from huggingface_hub import DatasetCardData, ModelCardData

    common = {"license": terms.license, "license_name": terms.license_name,
              "license_link": terms.license_link, "language": list(terms.language) or None,
              "tags": list(tags)}
    name = repo.partition("/")[2]
    if kind == RESULTS:
        return DatasetCardData(**common, pretty_name=name)
    found = [base.repo for base in bases]
    return ModelCardData(
        **common, base_model=found[0] if len(found) == 1 else found or None,
        base_model_relation=relation, pipeline_tag="text-generation",
        library_name="peft" if kind == ADAPTER else "transformers",
        **({"model_name": name, "eval_results": list(results)} if results else {}))


def eval_results(results: Sequence[Results]) -> list["EvalResult"]:
    """One entry for each task and length, with its number of prompts and interval."""
    from huggingface_hub import EvalResult

    found = []
    for result in results:
        for name, task in result.data["summary"]["tasks"].items():
            for length, entry in task["lengths"].items():
                found.append(EvalResult(
                    task_type="text-generation", dataset_type=str(task.get("task", name)),
                    dataset_name=f"{name} at {format_length(int(length))}",
                    dataset_config=f"{length} tokens", metric_type="accuracy",
                    metric_name="mean grade" if "truncated" in entry else "share of right answers",
                    metric_value=entry["score"],
                    metric_args={key: entry[key] for key in ("n", "wilson_low", "wilson_high")}))
    return found
