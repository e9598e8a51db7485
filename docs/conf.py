"""Sphinx: the book of executed notebooks (build.py). Nothing is executed, and nothing fetched."""

from pathlib import Path

import yaml

project = "latentree"
author = "The latentree developers"
html_title = "latentree"
html_favicon = "favicon.svg"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
]
templates_path = ["_templates"]

exclude_patterns = ["README.md"]  # index.md includes a part of it
nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "plain"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
# With a line `repository-code: https://github.com/...` in CITATION.cff, pages of notebooks get
# buttons that open them on Colab and Binder.
cited = yaml.safe_load((Path(__file__).parents[3] / "CITATION.cff").read_text("utf-8"))
if "repository-code" in cited:
    html_theme_options |= {
        "repository_url": cited["repository-code"],
        "repository_branch": "main",
        "path_to_docs": "notebooks",
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
        },
    }
html_static_path, html_css_files = ["_static"], ["book.css"]
html_js_files = [("film.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_show_copyright = html_show_sourcelink = False
html_copy_source = False


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks: other markup is escaped."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [
            part.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("_", "\\_")
            for part in parts[::2]
        ]
        lines[number] = "`".join(parts)
    spaced = []
    for line in lines:  # a list, or a block that is set in, stands between empty lines
        before = spaced[-1] if spaced else ""
        deeper = len(line) - len(line.lstrip()) - (len(before) - len(before.lstrip()))
        goes_on = deeper == 0 or deeper == 2 and before.lstrip().startswith("- ")
        if before.strip() and line.strip() and (line.lstrip().startswith("- ") or not goes_on):
            spaced.append("")
        spaced.append(line)
    lines[:] = spaced


def setup(app):
    app.connect("autodoc-process-docstring", as_rst)
