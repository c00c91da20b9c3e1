# SPDX-License-Identifier: Apache-2.0
"""The changes of one file that `scripts/mutants` tries, each in one place."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from typing import NamedTuple

LONGEST_SHOWN = 100
TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
REPLACED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


class Mutant(NamedTuple):
    """One change of one place."""

    file: str
    function: str
    text: str  # the line where it begins
    change: str
    number: int  # of the line
    source: bytes  # of the file, changed

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What stays the same while other lines come and go."""
        return self.file, self.function, self.text, self.change

    @property
    def id(self) -> str:
        """A short form of the name."""
        return hashlib.sha256("\0".join(self.name).encode()).hexdigest()[:8]


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.mutants: list[Mutant] = []
        self._file = file
        self._source = source
        self._lines = source.splitlines(keepends=True)
        self._functions: list[str] = []
        self._twins: Counter[tuple[str, ...]] = Counter()
        self.visit(ast.parse(source))

    def _offset(self, line: int, column: int) -> int:
        return sum(len(text) for text in self._lines[: line - 1]) + column

    def _add(self, old: ast.expr | ast.stmt, new: ast.expr | ast.stmt) -> None:
        before, after = ast.unparse(old), ast.unparse(ast.fix_missing_locations(new))
        line, end = old.lineno, self._offset(old.end_lineno or 0, old.end_col_offset or 0)
        text = self._lines[line - 1].decode().strip()
        change = f"{_short(before)} -> {_short(after)}"
        name = (self._file, ".".join(self._functions), text, change)
        self._twins[name] += 1
        twin = f" (#{self._twins[name]})" if self._twins[name] > 1 else ""
        put = after if isinstance(new, ast.stmt) else f"({after})"
        changed = (
            self._source[: self._offset(line, old.col_offset)] + put.encode() + self._source[end:]
        )
        self.mutants.append(Mutant(*name[:3], name[3] + twin, line, changed))

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Not the decorators and annotations: what they declare is for mypy.
        self._functions.append(node.name)
        if not isinstance(node, ast.ClassDef):
            for default in filter(None, [*node.args.defaults, *node.args.kw_defaults]):
                self._text(default)
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._functions.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._inside(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        alias = not self._functions and any(not name.isupper() for name in names)
        if not (alias and isinstance(node.value, ast.BinOp)):  # a union of types
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts for people stay as they are."""

    def _condition(self, node: ast.If | ast.While | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Constant) and ast.unparse(node.test) != "TYPE_CHECKING":
            for fixed in (True, False):
                self._add(node.test, ast.Constant(fixed))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._condition(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._add(condition, ast.Constant(value=True))
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add(node, ast.Pass())
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        value = node.value
        if isinstance(value, ast.Compare | ast.BoolOp):
            self._add(value, ast.UnaryOp(ast.Not(), value))
        elif value is not None and not isinstance(value, ast.Constant | ast.UnaryOp):
            self._add(value, ast.Constant(None))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            turned = [*node.ops[:place], TURNED[type(operator)](), *node.ops[place + 1 :]]
            self._add(node, ast.Compare(node.left, turned, node.comparators))
        for side in (node.left, *node.comparators):
            members = side.elts if isinstance(side, ast.Set | ast.Tuple | ast.List) else [side]
            for member in members:
                self._text(member)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = (ast.JoinedStr, ast.Constant)
        joins = isinstance(node.op, ast.Add) and any(
            isinstance(side, texts) and not isinstance(getattr(side, "value", ""), int | float)
            for side in (node.left, node.right)
        )
        if joins or type(node.op) not in REPLACED:  # such as a union
            self._add(node, node.left)
        else:
            self._add(node, ast.BinOp(node.left, REPLACED[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node, node.operand)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, ast.Constant(not value))
        elif isinstance(value, int):
            self._add(node, ast.Constant(value + 1))
        elif isinstance(value, float):
            self._add(node, ast.Constant(value * 2 or 1.0))

    def _text(self, node: ast.expr) -> None:
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str):
            self._add(node, ast.Constant(value + "~"))
        elif isinstance(value, bytes):
            self._add(node, ast.Constant(value + b"~"))


def _short(code: str) -> str:
    return code if len(code) <= LONGEST_SHOWN else f"{code[: LONGEST_SHOWN - 1]}…"
