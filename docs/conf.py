"""The configuration of Sphinx. `.ci/docs` builds this folder, with warnings as errors.

The built site needs no network: diagrams are drawn by Graphviz at build time and are part of the
pages, and the theme brings its own scripts and fonts.
"""

from __future__ import annotations

from importlib.metadata import version as version_of

from sphinx.ext.autodoc.mock import mock

project = "warmserve_rt"
copyright = "the warmserve_rt authors, Apache-2.0"
version = release = version_of("warmserve_rt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.graphviz",
    "sphinx.ext.napoleon",
]

# Markdown
myst_heading_anchors = 3  # links of the form page.md#heading, as GitHub resolves them

# Diagrams
graphviz_output_format = "svg"
graphviz_dot_args = [
    *("-Gfontname=sans-serif", "-Nfontname=sans-serif", "-Efontname=sans-serif"),
    *("-Gbgcolor=transparent", "-Gfontsize=11", "-Nfontsize=11", "-Efontsize=10"),
    *("-Nshape=box", "-Nstyle=filled,rounded", "-Nfillcolor=#eef3fb", "-Ncolor=#5b7db1"),
    *("-Nfontcolor=#1b2a41", "-Ecolor=#5b7db1", "-Efontcolor=#5b7db1", "-Gcolor=#9fb3d1"),
    "-Gfontcolor=#5b7db1",
]

# The API reference. The build imports warmserve_rt, but needs neither torch nor an engine.
autodoc_mock_imports = ["accelerate", "torch", "transformers", "vllm"]


class _Mocked(type):
    """A class with attributes of every name but those of Python, which a mock would have too."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


with mock(autodoc_mock_imports):
    import torch

    torch.Tensor = _Mocked("Tensor", (), {})  # the engine derives classes from it
    import warmserve_rt.engines.transformers  # noqa: F401
autodoc_typehints = "none"  # the docstrings give types
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"warmserve_rt {release}"
html_show_sphinx = False
