"""The documentation site.

sphinx-build -W --keep-going docs docs/_build/html                     # runs the examples, some minutes
sphinx-build -W --keep-going -D plot_gallery=0 docs docs/_build/html   # does not
"""

import os
import re
import sys
from pathlib import Path

from ganclean._version import __version__

# The processes that examples start see it too.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "ganclean"
author = "The ganclean developers"
copyright = "The ganclean developers, MIT licence"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "mathml",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
# What stands in single backticks in a docstring is code.
default_role = "code"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# Attributes that only a fitted object has cannot be looked up in its class.
numpydoc_attributes_as_param_list = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"__init__\.py",
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "gallery.reset"),
    "within_subsection_order": "gallery.TeachingOrder",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "remove_config_comments": True,
}

html_theme = "furo"
html_title = "ganclean"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f5d8c", "color-brand-content": "#0f5d8c"},
    "dark_css_variables": {"color-brand-primary": "#7cc0e8", "color-brand-content": "#7cc0e8"},
}


def escape_shapes(app, what, name, obj, options, lines):
    """Keep the star of a shape such as (n, *sample_shape) from opening an emphasis."""
    lines[:] = [re.sub(r"(?<=[(, ])\*(?=[a-z]\w*_shape\b)", r"\\*", line) for line in lines]


def skip_metadata_requests(app, what, name, obj, skip, options):
    """Leave out the methods of metadata routing that scikit-learn adds to every estimator."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def setup(app):
    # Before numpydoc, which takes docstrings apart at the default priority.
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)
    app.connect("autodoc-skip-member", skip_metadata_requests)
