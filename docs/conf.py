"""The site, `make docs`. Its root is the project's, so that links from docs/ to README.md work here and on GitHub."""

import fcn_jax

project = "fcn_jax"
author = "The fcn_jax authors"
release = version = fcn_jax.__version__
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
html_theme = "furo"
html_title = f"fcn_jax {release}"
