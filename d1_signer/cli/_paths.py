# SPDX-License-Identifier: Apache-2.0
"""Paths and key URIs as text, which a shell completes; who uses them says what is wrong."""

from __future__ import annotations

import contextlib
import os
from urllib.parse import quote, unquote

import click
from click.shell_completion import CompletionItem

_FILE = "file://"
_BEGINNINGS = ("pkcs11:", "awskms:///", "gcpkms://", "hashivault://", f"{_FILE}/")


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


class _KeyUri(click.types.StringParamType):
    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's signature)
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """The beginnings of key URIs, and the files of file:, see `click.ParamType`."""
        if incomplete.startswith(f"{_FILE}/"):
            return [CompletionItem(uri) for uri in _file_uris(incomplete)]
        return [CompletionItem(each) for each in _BEGINNINGS if each.startswith(incomplete)]


def _file_uris(incomplete: str) -> list[str]:
    # A shell completes no path in a URI, in which a blank is %20.
    folder, _, beginning = unquote(incomplete.removeprefix(_FILE)).rpartition("/")
    found = []
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or "/") as entries:
        for entry in entries:
            hidden = entry.name.startswith(".") and not beginning
            if entry.name.startswith(beginning) and not hidden:
                path = quote(f"{folder}/{entry.name}")
                found.append(f"{_FILE}{path}/" if entry.is_dir() else f"{_FILE}{path}")
    return sorted(found)


FILE = _Path("file")
FOLDER = _Path("dir")
KEY_URI = _KeyUri()
