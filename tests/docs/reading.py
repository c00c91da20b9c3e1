# SPDX-License-Identifier: Apache-2.0
"""What the code itself says it logs and raises, and the tables of a page."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "d1_signer"
LEVELS = {"debug", "info", "warning", "error"}
_EVENT = re.compile(r"(?:[a-z][a-z0-9_]*|%s)\.[a-z0-9_]+")


@dataclass(frozen=True)
class Line:
    """One call that writes to the log."""

    place: str
    logger: str
    event: str
    level: str


@dataclass(frozen=True)
class Error:
    """One kind of error: its code, and whether it is retryable."""

    code: str
    retryable: bool


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def _is_get_logger(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"


def _logger_name(call: ast.Call, module: str) -> str:
    (argument,) = call.args
    return argument.value if isinstance(argument, ast.Constant) else module  # type: ignore[return-value]


def log_lines() -> list[Line]:
    """Every call of a logger in the package, however the logger is called there."""
    found = []
    for module, tree in modules():
        loggers = {
            target.id: _logger_name(node.value, module)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and _is_get_logger(node.value)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Call)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            receiver = node.func.value
            if isinstance(receiver, ast.Name) and receiver.id in loggers:
                logger = loggers[receiver.id]
            elif isinstance(receiver, ast.Call) and _is_get_logger(receiver):
                logger = _logger_name(receiver, module)
            else:
                continue
            if node.args and node.func.attr in {*LEVELS, "log", "exception", "critical", "warn"}:
                text = ast.literal_eval(node.args[0])
                event = _EVENT.match(text)
                place = f"{module}:{node.lineno}"
                found.append(Line(place, logger, event[0] if event else "", node.func.attr))
    return found


def error_kinds() -> list[Error]:
    """Every class in the package that has a code of its own, the command's among them."""
    kinds: dict[str, tuple[str, str | None, bool | None]] = {}
    for _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                values = _class_values(node)
                base = ast.unparse(node.bases[0]) if node.bases else ""
                code, retryable = values.get("code"), values.get("default_retryable")
                if code is not None or retryable is not None or node.name in kinds:
                    kinds[node.name] = (base, code, retryable)  # type: ignore[assignment]

    def retried(name: str) -> bool:
        base, _, own = kinds.get(name, ("", None, False))
        return retried(base) if own is None else own

    return [Error(code, retried(name)) for name, (_, code, _) in kinds.items() if code is not None]


def _class_values(node: ast.ClassDef) -> dict[str, object]:
    values: dict[str, object] = {}
    for statement in node.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ):
                values[name] = value
            case _:
                pass
    return values


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next heading of its level."""
    marks = re.search(rf"^(#+) {re.escape(title)}$", page, re.MULTILINE)
    assert marks is not None, title
    rest = page[marks.end() :]
    return re.split(rf"^#{{1,{len(marks[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str, width: int) -> list[list[str]]:
    """The cells of the tables of that many columns, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {i - 1 for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")}
    rules = {i + 1 for i in heads}
    return [
        row
        for i, row in enumerate(cells)
        if len(row) == width and i not in heads and i not in rules
    ]


def anchors(page: str) -> set[str]:
    """What links to the headings of a page are called."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@dataclass(frozen=True)
class Snippet:
    """What is printed to be run: a fenced block of a page, a literal one of a docstring."""

    page: str
    language: str
    text: str
    mark: str = ""

    @property
    def key(self) -> str:
        """Page, and the mark above the snippet or its first line: unique."""
        return f"{self.page}: {self.mark or self.text.strip().splitlines()[0]}"


# A fence of any kind, and the comment above it that names it for a test.
_FENCED = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?"
    r"[ >]*(?P<fence>`{3,}|~{3,})(?P<language>[^\n]*)\n(?P<text>.*?)^[ >]*(?P=fence)[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_LITERAL = re.compile(r"^( *)(?:\S.*)?::\n\n((?:\1 +\S.*\n|\n)+)", re.MULTILINE)


@cache
def snippets() -> tuple[Snippet, ...]:
    """Every snippet of the pages and of the package's docstrings, whatever it holds."""
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        page = str(path.relative_to(ROOT))
        if page.startswith((".", "build/", "dist/", "shared/")):
            continue
        text = path.read_text(encoding="utf-8")
        found += [
            Snippet(page, block["language"], block["text"], block["mark"] or "")
            for block in _FENCED.finditer(text)
        ]
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                told = (ast.get_docstring(node) or "") + "\n"
                page = str(path.relative_to(ROOT))
                found += [
                    Snippet(page, "docstring", textwrap.dedent(block))
                    for _, block in _LITERAL.findall(told)
                ]
    return tuple(found)
