"""Sphinx settings: sphinx-build -W -b html docs docs/_build/html"""

import sys
from pathlib import Path

import patchlib

sys.path.append(str(Path(__file__).parent))

project = "patchlib"
author = "the patchlib authors"
copyright = "the patchlib authors, Apache License 2.0"
version = release = patchlib.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference_directives"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"patchlib {release}"
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # docstrings put names in single backticks
autodoc_inherit_docstrings = False  # torch's words on nn.Module.forward say nothing about ours
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_custom_sections = [("Shape", "notes_style")]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
