# SPDX-License-Identifier: Apache-2.0
"""What Sphinx is told about this repository: the sidebar, folders as links, the public names.

The pages carry no directive, since they are read on a code host as well; what the site needs beside
them is added here.
"""

from __future__ import annotations

import html
import inspect
import re
import shutil
from enum import Enum
from importlib import import_module
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.addnodes import desc_annotation, pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

import d1_signer
from d1_signer import D1SignerError

ROOT = "README"
# The sidebar. What is named nowhere is added: to the README of its folder where there is one, else
# to the end of the first group.
SIDEBAR = {
    "Use": ["docs/onboarding", "docs/token", "docs/settings", "docs/cli", "docs/tls"],
    "Operate": ["docs/fleet", "docs/rotation", "docs/observability", "docs/runbook"],
    "Keys": [
        *("docs/pkcs11/README", "docs/cloud/README", "softhsm/README"),
        *("docs/custody/README", "docs/audit/README"),
        *("docs/backends", "tests/plugin_example/README"),
    ],
    "API reference": [
        f"docs/site/reference/{page}"
        for page in ("README", "tokens", "keys", "custody", "audit", "events", "errors", "testing")
    ],
    "Project": [
        *("docs/architecture", "docs/adr/README", "docs/releases"),
        *("CONTRIBUTING", "SECURITY", "CHANGELOG"),
    ],
}


HOMES: dict[str, list[str]] = d1_signer._HOMES  # noqa: SLF001 (the one list of what is public)
# Where each public name is defined, which its annotations name, and where users find it.
PUBLIC = {
    f"d1_signer.{home}.{name}": f"d1_signer.{name}"
    for home, names in HOMES.items()
    for name in names
}


def index_of(page: str) -> str:
    """Return the README of the folder that a page is in, or of the one above for a README."""
    folder = PurePosixPath(page).parent
    if PurePosixPath(page).name == "README":
        folder = folder.parent
    return str(folder / "README")


def toctree(pages: list[str], *options: str) -> str:
    lines = ["```{toctree}", ":hidden:", *options, *(f"/{page}" for page in pages), "```"]
    return "\n".join(["", *lines, ""])


def add_sidebar(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the README of a folder the pages below it, and that of the repository the groups."""
    if PurePosixPath(page).name != "README":
        return
    named = {name for group in SIDEBAR.values() for name in group}
    found = app.env.found_docs - named - {ROOT}
    if page == ROOT:
        left = sorted(name for name in found if index_of(name) not in named)
        for caption, pages in SIDEBAR.items():
            source[0] += toctree(pages + left, f":caption: {caption}")
            left = []
    elif below := sorted(name for name in found if index_of(name) == page):
        source[0] += toctree(below)


def link_folders(app: Sphinx, doctree: nodes.document) -> None:
    """Let a link to a folder lead to its README, as a code host does."""
    folder = Path(doctree["source"]).parent
    for link in doctree.findall(pending_xref):
        if link["reftype"] == "myst" and not link.get("refdomain"):
            path = (folder / link["reftarget"] / "README").resolve()
            page = path.is_relative_to(app.srcdir) and path.relative_to(app.srcdir).as_posix()
            if page in app.env.found_docs:
                link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, None


def shorten_types(_app: Sphinx, doctree: nodes.document) -> None:
    """Show the type of an attribute as it is written, as signatures do, not with its module."""
    for link in doctree.findall(pending_xref):
        if link.astext() == link["reftarget"] and link["reftarget"].startswith("d1_signer."):
            for text in list(link.findall(nodes.Text)):
                text.parent.replace(text, nodes.Text(text.rpartition(".")[2]))


def link_homes(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Lead from the module that defines a class, which an annotation names, to its public name."""
    if node.get("refdomain") != "py" or node["reftarget"] not in PUBLIC:
        return None
    target = PUBLIC[node["reftarget"]]
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


class PublicNames(SphinxDirective):
    """``.. public-names:: token.fetcher token``: what is offered from these modules and folders.

    In their order; from one module in the order of its source.
    """

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        names: dict[str, None] = {}
        for place in self.arguments[0].split():
            homes = [h for h in HOMES if f"{h}.".startswith(f"{place}.")]
            if not homes:
                raise self.error(f"d1_signer.{place} has no public name.")
            for home in homes:
                order = list(vars(import_module(f"d1_signer.{home}")))
                names |= dict.fromkeys(sorted(HOMES[home], key=order.index))
        listed = " · ".join(f":py:obj:`~d1_signer.{name}`" for name in names)
        return self.parse_text_to_nodes(
            "\n".join([listed, "", *chain.from_iterable(map(entry, names))])
        )


def entry(name: str) -> list[str]:
    """Return what autodoc is told of a public name."""
    thing = getattr(d1_signer, name)
    if not inspect.isclass(thing):
        kind = "function" if inspect.isroutine(thing) else "data"
        return [f".. auto{kind}:: d1_signer.{name}", ""]
    kind = "class"
    if issubclass(thing, D1SignerError):
        kind = "exception"
        options = [":show-inheritance:", ":undoc-members:"]  # codes, and whether a retry helps
    elif issubclass(thing, Enum):
        options = [":undoc-members:"]
    elif any(base.__module__.startswith("d1_signer.") for base in thing.__bases__):
        options = [":inherited-members:"]  # of a class that has no page
    else:
        options = []
    return [f".. auto{kind}:: d1_signer.{name}", *(f"   {option}" for option in options), ""]


def keep_first_line(_app: Sphinx, what: str, *rest: Any) -> None:
    """Keep napoleon from taking ``What it is: more of it`` for ``type: description``."""
    if what in {"attribute", "data", "property"}:
        rest[-1][:0] = ["..", ""]


def take_own_words(_app: Sphinx, what: str, name: str, *rest: Any) -> None:
    """Describe an alias of types by what stands below it, not by what Python says of its kind."""
    if what == "data" and name in PUBLIC.values():
        (home,) = (place.rpartition(".")[0] for place, public in PUBLIC.items() if public == name)
        told = ModuleAnalyzer.for_module(home).find_attr_docs()
        rest[-1][:] = told["", name.rpartition(".")[2]]


def leave_out_arguments(
    _app: Sphinx, what: str, _name: str, thing: object, *_rest: object
) -> tuple[str, None] | None:
    """All errors are made as their root is, and nobody makes a protocol."""
    ours = what == "exception" and D1SignerError in getattr(thing, "__mro__", ())
    protocol = what == "class" and getattr(thing, "_is_protocol", False)
    return ("", None) if protocol or (ours and thing is not D1SignerError) else None


def leave_out_objects(_app: Sphinx, doctree: nodes.document) -> None:
    """Show no value that holds an object: its ``repr`` tells nothing."""
    for value in list(doctree.findall(desc_annotation)):
        if re.search(r"<[\w.]+ object", value.astext()):
            value.parent.remove(value)


def let_long_words_break(_app: Sphinx, doctree: nodes.document) -> None:
    """A digest is wider than a phone. Any other word of code is kept whole, as an option is."""
    for code in doctree.findall(nodes.literal):
        if max(map(len, code.astext().split()), default=0) > _LONG:
            code["classes"].append("long")


_LONG = 36


def label_cells(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Tell each cell the head of its column: on a phone a row is a card, and has no head above."""
    if "body" in context:
        context["body"] = _TABLE.sub(_labelled, context["body"])


_TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
# Of name and value none has to be told which it is.
_PAIR = 2


def _labelled(table: re.Match[str]) -> str:
    heads = [html.unescape(_TAG.sub("", head)) for head in _HEAD.findall(table[0])]
    if len(heads) <= _PAIR:
        return table[0]
    head, *rows = table[0].split("<tr")
    for row in rows:
        before, *cells = row.split("<td")
        labels = (f'<td data-label="{html.escape(text)}: "' if text else "<td" for text in heads)
        head += "<tr" + before + "".join(map("".join, zip(labels, cells, strict=False)))
    return head


def add_index(app: Sphinx, failure: Exception | None) -> None:
    """The first page under the name that a web server looks for."""
    if failure is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{ROOT}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_lexer("hcl", TextLexer)  # Pygments knows Terraform's HCL only, not a policy of Vault
    app.add_directive("public-names", PublicNames)
    for field in PythonDomain.directives["class"].doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("source-read", add_sidebar)
    app.connect("doctree-read", link_folders)
    app.connect("doctree-read", shorten_types)
    app.connect("doctree-read", let_long_words_break)
    app.connect("missing-reference", link_homes)
    app.connect("doctree-read", leave_out_objects)
    app.connect("autodoc-process-docstring", take_own_words, priority=300)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
    app.connect("autodoc-process-signature", leave_out_arguments)
    app.connect("html-page-context", label_cells)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
