"""Pages that stages write: one HTML file each, with nothing loaded from elsewhere."""

from pathlib import Path
from typing import Any

_LAYOUT = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Fill a template that extends `page.html.jinja`; text is escaped, a missing value an error.

    Args:
        template: the file; it may import the macros of `chart.html.jinja`.
        values: what it names; `title` among them.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _LAYOUT]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template.name).render(**values)
