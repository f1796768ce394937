"""How Sphinx makes the site: ``make docs``.

Sphinx, because the docstrings are reStructuredText; MyST, so that the pages are Markdown that reads well in the repository,
too. Nothing is fetched: no fonts, no scripts, no inventories of others.
"""

import re
from typing import Any

from sphinx.application import Sphinx

import aionpredis
from aionpredis import blocking
from aionpredis.blocking.facade import Facade

project = "aionpredis"
author = "aionpredis contributors"
version = release = aionpredis.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
default_role = "code"
nitpicky = True  # a name in a docstring that leads nowhere is a mistake
others = (
    "anyio|collections|gymnasium|jax|numpy|opentelemetry|os|pathlib|redis|stable_baselines3|tensordict|torch|typing"
)
nitpick_ignore_regex = [
    ("py:.*", rf"({others}|aionpredis\.blocking\.facade)\..*"),
    ("py:.*", r"(aionpredis\..*\.)?(T|Buffer|Ids|NDArray|Tensor)"),  # of the type checker
]

# Links and anchors are those of the repository: page.md#a-heading; a file that is no page is a download.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["gymnasium", "jax", "stable_baselines3", "tensordict", "torch"]  # too large for this
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"aionpredis {version}"
html_copy_source = False
html_show_copyright = False
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
    made = isinstance(obj, type) and (re.search(r"\b[Mm]ade by\s", obj.__doc__ or "") or issubclass(obj, Facade))
    if what == "exception" or (made and obj is not blocking.Loader):
        return "", None
    # NDArray[…], as it stands in the source
    array = r"~numpy\.ndarray\[~?tuple\[~?typing\.Any, \.\.\.\], ~numpy\.dtype\[(.*?)\]\]"
    return tuple(part and re.sub(array, r"~numpy.typing.NDArray[\1]", part) for part in (signature, returns))


def docstrings(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What a blocking method does is said once, of the async one. And ``Raises:`` with indented ``Error, Error: when``
    becomes fields. (sphinx.ext.napoleon would do that, but it also takes an attribute's ``Now: held by writers`` for its type.)
    """
    if name.startswith("aionpredis.blocking.") and name.count(".") == 3:
        kind, member = name.split(".")[2:]
        theirs = getattr(getattr(aionpredis, kind, None), member, None)
        if theirs is not None and theirs.__doc__ == obj.__doc__:
            lines[:] = [f"Without async: :any:`aionpredis.{kind}.{member}`."]
    if "Raises:" in lines:
        start = lines.index("Raises:")
        lines[start] = ""
        for number in range(start + 1, len(lines)):
            if lines[number] and not lines[number].startswith(" "):
                break
            lines[number] = re.sub(r"^    (?=\S)(.*?): ", r":raises \1: ", lines[number])
    for number in range(len(lines) - 1, 0, -1):
        if re.match(r"``\w+``(, ``\w+``)*: ", lines[number]) and lines[number - 1][:1].strip():
            lines.insert(number, "")  # each parameter is a paragraph


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", signatures)
    app.connect("autodoc-process-docstring", docstrings)
    return {"parallel_read_safe": True}
