"""A directive that lists every setting of `esjax.config.settings` with its type, its default and its docstring."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from esjax.config import settings as config
from esjax.config.models import MODELS
from esjax.config.section import Section

SECTIONS: dict[str, type[Section]] = {
    "": config.Config,
    "data": config.DataConfig,
    "es": config.EsConfig,
    "optim": config.OptimConfig,
    "reward": config.RewardConfig,
    "hosts": config.HostsConfig,
    **{f"model ({name})": kind for name, kind in MODELS.items()},
}


class Settings(SphinxDirective):
    """`settings`: a section for each group of settings."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        return [section_of(prefix, section) for prefix, section in SECTIONS.items()]


def section_of(prefix: str, section: type[Section]) -> nodes.section:
    """Build the list of a group."""
    title = prefix or "the run"
    found = nodes.section(ids=[nodes.make_id(f"settings {title}")])
    found += nodes.title(text=title)
    found += nodes.paragraph(text=inspect.getdoc(section))
    listed = nodes.definition_list()
    name_of = prefix.split(" ")[0]
    for name, kind, default, text in fields_of(section):
        term = nodes.term()
        term += nodes.literal(text=f"{name_of}.{name}" if name_of else name)
        term += nodes.Text(f"  {kind}, default {default}")
        body = nodes.definition()
        body += nodes.paragraph(text=text)
        item = nodes.definition_list_item()
        item += [term, body]
        listed += item
    found += listed
    return found


def fields_of(section: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and docstring of each setting that is no group itself."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name), annotation=kind), ast.Expr(ast.Constant(str(words))):
                yield name, ast.unparse(kind), repr(default_of(section, name)), " ".join(words.split())


def default_of(section: type[Section], name: str) -> Any:
    """Return the default of a setting."""
    return getattr(section(), name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
