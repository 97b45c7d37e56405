"""The documentation site: `scripts/docs` builds it."""

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

from stepfuse.data.palette import DARK, LIGHT

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # on import it warns of torchvision, which is not needed

project = "stepfuse"
author = copyright = "The stepfuse authors"
release = version = installed("stepfuse")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository_files",
    "generated_pages",
    "plain_docstrings",
    "mathml",
    "unbroken_text",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]  # functions among the settings below; every page is read again

# Files of the repository outside docs/ that the site shows as pages. Their page in docs/ is a line that links to them.
repository_pages = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "data/emoji-set/README.md": "cards/emoji-set",
    "data/emoji-flow-set/README.md": "cards/emoji-flow-set",
    "data/emoji-flow/README.md": "cards/emoji-flow",
    "data/emoji-base/pipeline/README.md": "cards/emoji-base",
    "data/emoji-base/clip/README.md": "cards/emoji-clip",
}

nb_execution_mode = "off"  # tests run the notebooks
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 4  # as the repository's own pages have them
smartquotes_action = "D"  # dashes; quotation marks stay as they are typed
default_role = "code"  # `names` in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*", r"https://huggingface\.co/.*"]  # made by scripts
linkcheck_timeout = 20
linkcheck_ignore = [r"http://(localhost|127\.0\.0\.1)(:\d+)?(/.*)?"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "stepfuse"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": LIGHT.accent, "color-brand-content": LIGHT.accent},
    "dark_css_variables": {"color-brand-primary": DARK.accent, "color-brand-content": DARK.accent},
}
copybutton_exclude = ".linenos, .gp, .go"
