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
autodoc_default_options = {"members": True, "show-inheritance": False}
# Fields are described once, in the class docstring
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
default_role = "code"  # docstrings mark code with single backticks


def escape_bars(_app, _kind, _name, _object, _options, lines):
    """Keep |G|, a norm in a docstring, from being read as a substitution."""
    lines[:] = [re.sub(r"(?<!\S)\|(?=\S)", r"\\|", line) for line in lines]


def setup(app):
    """Register the correction of docstrings."""
    app.connect("autodoc-process-docstring", escape_bars)
