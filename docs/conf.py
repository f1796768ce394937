"""How Sphinx makes the site: ``make docs``.

Sphinx, because the docstrings are reStructuredText; MyST, so that the pages are Markdown that reads well in the repository,
too. Nothing is fetched: no fonts, no scripts, no inventories of others.
"""

import re
from typing import Any

from sphinx.application import Sphinx

import aionpredis

project = "aionpredis"
author = "aionpredis contributors"
version = release = aionpredis.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
default_role = "code"
nitpicky = True  # a name in a docstring that leads nowhere is a mistake
nitpick_ignore_regex = [
    ("py:.*", r"(anyio|collections|numpy|opentelemetry|os|redis|typing)\..*"),  # of others
    ("py:.*", r"(aionpredis\..*\.)?(T|NDArray|Buffer)"),  # of the type checker
]

# Links and anchors are those of the repository: page.md#a-heading; a file that is no page is a download.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"aionpredis {version}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# The public name of a class that is called otherwise where it is defined.
aionpredis.Run.__name__ = aionpredis.Run.__qualname__ = "Run"
aionpredis.Run.__module__ = "aionpredis"


def signatures(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, ...] | None:
    """Nobody calls a class that another object makes (its docstring says who does), or an exception."""
    if signature is None:
        return None
    if what == "exception" or (what == "class" and re.search(r"\bmade by\s", obj.__doc__ or "", re.IGNORECASE)):
        return "", None
    # NDArray[…], as it stands in the source
    array = r"~numpy\.ndarray\[~?tuple\[~?typing\.Any, \.\.\.\], ~numpy\.dtype\[(.*?)\]\]"
    return tuple(part and re.sub(array, r"~numpy.typing.NDArray[\1]", part) for part in (signature, returns))


def fields_of_raises(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """``Raises:`` with indented ``Error, Error: when`` becomes fields. (sphinx.ext.napoleon would do it, but it also takes
    an attribute's ``Now: held by writers`` for its type.)
    """
    if "Raises:" in lines:
        start = lines.index("Raises:")
        lines[start] = ""
        for number in range(start + 1, len(lines)):
            if lines[number] and not lines[number].startswith(" "):
                break
            lines[number] = re.sub(r"^    (?=\S)(.*?): ", r":raises \1: ", lines[number])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", signatures)
    app.connect("autodoc-process-docstring", fields_of_raises)
    return {"parallel_read_safe": True}
