"""The site: make docs."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone documents itself

project = "barlow-loss"
author = "The barlow-loss contributors"
version = release = importlib.metadata.version("barlow-loss")
copyright = "the barlow-loss contributors"  # noqa: A001

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["*.json", "*.ipynb", "pypi.md"]
html_theme = "furo"
html_title = "barlow-loss"
html_extra_path: list[str] = []

myst_heading_anchors = 3  # [text](page.md#a-heading)
myst_url_schemes = ["http", "https"]
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signature and in the text
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Several processes", "Shape", ("Source", "References")]
autosummary_generate = True
