# SPDX-License-Identifier: Apache-2.0
"""The page of `audit show --html`: one file without scripts that asks for nothing else."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import starmap
from typing import Any

from d1_signer.audit.showing import references
from d1_signer.cli._output import printable

MOST_RECORDS = 20_000
"""Records that one page shows; browsers take no pleasure in more."""

_COLUMNS = 96
_WIDTH, _LANE, _LEFT = 960, 26, 170
_MOST_LANES = 20
_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #fff; --soft: #667; --line: #dde1e6;
  --done: #1f6feb; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #14171a; --soft: #9aa4ad;
  --line: #30363d; --done: #58a6ff; --bad: #ff7b72; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back);
  margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.done { fill: var(--done); } .bad { fill: var(--bad); } td.bad { color: var(--bad); }
.axis { stroke: var(--line); } .soft { color: var(--soft); }
"""
_Record = tuple[str, Mapping[str, Any]]


def page(records: Sequence[_Record]) -> str:
    """The whole page.

    Args:
        records: Instance and members of each; those behind `MOST_RECORDS` are left out, and the
            page says so.
    """
    shown = records[:MOST_RECORDS]
    outcomes = {
        (members.get("instance", instance), members.get("begin")): members
        for instance, members in shown
        if members.get("event") == "end"
    }
    rows = [
        _Row(instance, members, outcomes.get((instance, members.get("number"))))
        for instance, members in shown
        if members.get("event") != "end"
    ]
    left_out = "" if len(shown) == len(records) else f" The first {MOST_RECORDS} are shown."
    head = "".join(f"<th>{name}</th>" for name in _Row.HEAD)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>Audit trail</title><style>{_STYLE}</style></head><body><h1>Audit trail</h1>"
        f"<p>{len(shown)} records.{left_out} <span class=soft>Nothing of this was verified: "
        "d1-signer audit verify does that.</span></p>"
        f"{_timeline(rows)}<table><thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(row.html() for row in rows)}</tbody></table></body></html>\n"
    )


class _Row:
    HEAD = ("Time (UTC)", "What", "Key", "Purpose", "References", "Outcome", "Record")

    def __init__(
        self, instance: str, members: Mapping[str, Any], end: Mapping[str, Any] | None
    ) -> None:
        self.time = str(members.get("time", ""))
        self.lane = str(members.get("kid") or members.get("key") or "")
        begins = members.get("event") == "begin"
        self.what = str(members.get("action" if begins else "event", ""))
        self.uses = begins
        outcome = end if end is not None else members
        self.outcome = str(outcome.get("outcome", "no end is shown" if begins else ""))
        self._purpose = str(members.get("purpose", ""))
        self._references = ", ".join(starmap("{} {}".format, references(members)))
        self._place = f"{instance}#{members.get('number')}"

    @property
    def bad(self) -> bool:
        """Whether somebody should look at it."""
        return self.outcome not in {"", "done", "met"}

    def html(self) -> str:
        """One row of the table."""
        cells = (self.time, self.what, self.lane, self._purpose, self._references)
        text = "".join(f"<td>{_escaped(cell)}</td>" for cell in cells)
        marked = " class=bad" if self.bad else ""
        return (
            f"<tr>{text}<td{marked}>{_escaped(self.outcome)}</td>"
            f"<td class=soft>{_escaped(self._place)}</td></tr>\n"
        )


def _timeline(rows: Sequence[_Row]) -> str:
    """How often each key was used, and when: a lane for each, a bar for each piece of time."""
    moments = [(row, moment) for row in rows if row.uses and (moment := _seconds(row.time))]
    if not moments:
        return ""
    first, last = min(at for _, at in moments), max(at for _, at in moments)
    step = max(last - first, 1.0) / (_COLUMNS - 1)
    lanes = [lane for lane, _ in Counter(row.lane for row, _ in moments).most_common(_MOST_LANES)]
    counts = Counter((row.lane, int((at - first) / step), row.bad) for row, at in moments)
    most = max(
        counts[lane, column, False] + counts[lane, column, True] for lane, column, _ in counts
    )
    parts: list[str] = []
    for place, lane in enumerate(lanes):
        base = (place + 1) * _LANE
        parts.append(f'<text x="0" y="{base - 5}">{_escaped(lane[:26] or "no key")}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{base}" y2="{base}"/>')
        for column in range(_COLUMNS):
            top = float(base)
            for bad in (False, True):
                if count := counts[lane, column, bad]:
                    height = max(2.0, (_LANE - 4) * count / most)
                    top -= height
                    parts.append(_bar(column, top, height, count, bad=bad))
    height = len(lanes) * _LANE + 20
    ends = (_escaped(rows_time) for rows_time in (_at(moments, first), _at(moments, last)))
    parts.append(f'<text x="{_LEFT}" y="{height - 4}">{next(ends)}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{height - 4}" text-anchor="end">{next(ends)}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Uses of each key over time">'
        f"{''.join(parts)}</svg>"
    )


def _bar(column: int, top: float, height: float, count: int, *, bad: bool) -> str:
    width = (_WIDTH - _LEFT) / _COLUMNS
    kind, title = ("bad", "failed or without an end") if bad else ("done", "done")
    return (
        f'<rect class="{kind}" x="{_LEFT + column * width:.1f}" y="{top:.1f}" '
        f'width="{width - 1:.1f}" height="{height:.1f}"><title>{count} {title}</title></rect>'
    )


def _at(moments: Sequence[tuple[_Row, float]], moment: float) -> str:
    return next(row.time for row, at in moments if at == moment)


def _seconds(time: str) -> float | None:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        return None


def _escaped(text: str) -> str:
    return html.escape(printable(text))
