# SPDX-License-Identifier: Apache-2.0
"""Paths as text, which a shell completes; who reads the file says what is wrong with it."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


class _Path(click.types.StringParamType):
    def __init__(self, kind: str) -> None:
        self._kind = kind  # what the shell's script of click calls it

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's signature)
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Let the shell complete it, see `click.ParamType`."""
        return [CompletionItem(incomplete, type=self._kind)]


FILE = _Path("file")
FOLDER = _Path("dir")
