"""The documentation site: `make docs`."""

from importlib.metadata import metadata

project = "torch_bn"
author = copyright = "the torch_bn authors"
version = release = metadata("torch_bn")["Version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
# Links to files beside this folder, which the site does not have; the tests look where they lead.
suppress_warnings = ["myst.xref_missing"]
napoleon_custom_sections = ["Shape"]

html_theme = "furo"
html_title = f"torch_bn {release}"
