# SPDX-License-Identifier: Apache-2.0
"""Settings of the site: `make docs` makes it from the pages as they stand; see docs/adr/0033."""

from __future__ import annotations

import sys
from pathlib import Path

import d1_signer

sys.path.insert(0, str(Path(__file__).parent))

project = "d1_signer"
author = "The d1_signer authors"
version = release = d1_signer.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_extension"]

# The whole repository is the source, so that links between pages, and to files, are what they are
# on a code host.
root_doc = "README"
include_patterns = ["*.md", "docs/**", "softhsm/*.md", "tests/plugin_example/*.md"]
exclude_patterns = ["build", "dist", ".venv", "**/.*"]
myst_heading_anchors = 6

default_role = "py:obj"  # one backtick in a docstring is a name of ours, or code
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_use_ivar = True  # or the attributes of a dataclass would stand there twice
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"d1_signer {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "scorer.js")
html_copy_source = False
html_use_index = html_domain_indices = False  # the reference is short, and searched
html_show_sphinx = False
html_show_copyright = False
