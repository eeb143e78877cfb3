"""Settings of the documentation.

sphinx-build -W --keep-going -b html docs docs/_build
"""

import sys
from pathlib import Path

from jaxppo import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for pages.py

project = "jaxppo"
author = copyright = "The jaxppo authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.githubpages",
    "pages",
]
exclude_patterns = ["_build"]
smartquotes = False  # -- in a help text is an option
# Sphinx checks links to pages, headings and files; with -W a wrong one fails the build.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # annotations name types of other projects
myst_heading_anchors = 3
myst_enable_extensions = ["fieldlist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 72
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "jaxppo"
html_static_path = ["_static"]
html_css_files = ["jaxppo.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/jaxppo/jaxppo/",
    "source_branch": "main",
    "source_directory": "docs/",
}
pygments_style = "friendly"
pygments_dark_style = "monokai"
