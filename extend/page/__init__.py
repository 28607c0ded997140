"""Pages that stages write: one HTML file each, with nothing loaded from elsewhere."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extend.console import printable

if TYPE_CHECKING:
    import jinja2

_LAYOUT = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Fill a template that extends `page.html.jinja`; text is escaped, a missing value an error.

    Args:
        template: the file; it may import the macros of `chart.html.jinja` and its neighbours.
        values: what it names; `title` among them.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@cache  # to compile a template takes longer than to fill it, and a run's page is filled often
def _environment(directory: Path) -> "jinja2.Environment":
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([directory, _LAYOUT]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown)


def shown(value: Any) -> Any:
    """A value as templates write it: text without secrets, and without marks that no one sees.

    What is marked as HTML already was made by a template, out of values that came through here.
    """
    return printable(value) if type(value) is str else value
