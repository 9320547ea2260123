"""The documentation site: `sphinx-build -W docs build/docs`."""

import sys
from pathlib import Path

import esjax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "esjax"
release = version = esjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "settings_tables"]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = "esjax"
html_show_copyright = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
