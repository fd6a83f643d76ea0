"""The site's settings: `sphinx-build -W --keep-going -b html docs docs/_build`."""

from importlib.metadata import version as installed_version
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)

project = "mal_adapter"
author = "The mal_adapter authors"
copyright = "The mal_adapter authors, Apache-2.0"
version = release = installed_version("mal-adapter")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "pictures"]

myst_enable_extensions = ["dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring is code, and a link where the name is documented
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# The reference is made from signatures and docstrings, for which these need not be imported, nor installed.
autodoc_mock_imports = ["accelerate", "peft", "scipy", "sklearn", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"  # as the docstrings have it
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "mal_adapter"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def visit_math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Equations as MathML, which browsers draw by themselves: no script, no network."""
    try:
        self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    except latex2mathml.MathError as error:
        logger.warning("%s in %s", error, node.astext(), location=node)
    raise nodes.SkipNode


def link_to_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """A link for a name without its module, or with the module that defines it instead of the one to import it from."""
    domain: Any = env.get_domain("py")
    name = node["reftarget"].rpartition(".")[2]
    kinds = ("class", "exception", "function")  # not methods: an argument may have the name of one
    found = [
        full
        for full, entry in domain.objects.items()
        if full.endswith(f".{name}") and entry.objtype in kinds and not entry.aliased
    ]
    if node.get("refdomain") != "py" or not name or len(found) != 1:
        return None
    entry = domain.objects[found[0]]
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", text, internal=True, refuri=f"{uri}#{entry.node_id}", reftitle=found[0])


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("missing-reference", link_to_public_name)


html_math_renderer = "mathml"
