"""Sphinx: the pages of this folder, and the API reference from the docstrings."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of

project = "autobatch"
author = "the autobatch contributors"
project_copyright = author
release = version = version_of("lightning-autobatch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "autobatch"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "model_config"}
# Fields are described once, in the class docstring
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
default_role = "code"  # docstrings mark code with single backticks


def protect(_app, kind, _name, _documented, _options, lines):
    """Keep |G|, a norm, from being read as a substitution, and "x: y" of a property as a type; indent trees."""
    lines[:] = [re.sub(r"(?<!\S)\|(?=\S)", r"\\|", line) for line in lines]
    if kind == "property" and lines:
        lines[0] = lines[0].replace(": ", " – ")
    branches = [at for at, line in enumerate(lines) if line.startswith(("├", "└"))]
    if branches:  # a tree is shown as it is
        first, last = branches[0] - 1, branches[-1] + 1
        lines[first:last] = ["::", "", *(f"    {line}" for line in lines[first:last])]


def shorten_models(_app, _kind, _name, documented, _options, signature, result):
    """Leave out the signature of a pydantic model, whose fields are in its docstring."""
    return ("", None) if hasattr(documented, "model_fields") else (signature, result)


def setup(app):
    """Register the corrections of docstrings and signatures."""
    app.connect("autodoc-process-docstring", protect, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_models)
