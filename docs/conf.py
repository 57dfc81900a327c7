"""Sphinx settings. `make docs` builds the guide and the API reference into docs/_build/html."""

from importlib.metadata import version as installed_version

project = "vwt"
author = "the authors of vwt"
version = release = installed_version("vwt")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Markdown: headings are link targets down to the third level.
myst_heading_anchors = 3

# Docstrings: Google style, and single backticks are code, linked where they name a documented object.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"vwt {version}"
html_copy_source = False
