"""Pages of HTML that need nothing beside them: figures are in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganclean._version import __version__
from ganclean.exceptions import missing_extra


def write_page(folder: Path, template: str, **content: Any) -> Path:
    """Render a template of this package into ``index.html``, and return where that is.

    Parameters
    ----------
    folder : Path
    template : str
        The name of a template that extends ``page.html.j2``.
    **content
        What the template shows; ``title`` and ``settings``, a dict of what was done, among it.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise missing_extra("jinja2", "cli") from error
    loader = PackageLoader("ganclean", "reporting")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = folder / "index.html"
    page.write_text(environment.get_template(template).render(version=__version__, **content), encoding="utf8")
    return page


def figure_urls(displays: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of displays as data URLs, and close them."""
    import matplotlib.pyplot as plt

    urls = {}
    for name, display in displays.items():
        buffer = io.BytesIO()
        display.figure_.savefig(buffer, format="png", dpi=144)
        plt.close(display.figure_)
        urls[name] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return urls
