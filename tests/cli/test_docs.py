# SPDX-License-Identifier: Apache-2.0
"""The page about the command, held against the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from d1_signer.cli._app import cli
from d1_signer.cli.custody import _FILES
from tests.cli.conftest import Run

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
OPTIONS = {
    name: {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    for name, command in cli.commands.items()
}
for file_command in _FILES.values():
    OPTIONS["custody"] |= {flag for parameter in file_command.params for flag in parameter.opts}


def commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", PAGE, re.DOTALL)
    return re.findall(r"(?<![-\w/])d1-signer ([a-z-]+[^)\n&>]*)", "\n".join(blocks))


@pytest.mark.parametrize("line", commands())
def test_commands_and_flags_exist(line: str) -> None:
    name, *rest = line.partition(" -- ")[0].split()  # behind it, another command
    flags = {word for word in rest if word.startswith("--")}
    assert flags <= OPTIONS[name]


def test_every_flag_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<=`)--[a-z-]+", PAGE))
    assert named <= set().union(*OPTIONS.values())


def test_all_commands_are_listed() -> None:
    head = PAGE.partition("## Settings")[0]
    listed = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \|$", head, re.MULTILINE)
    assert set(listed) == set(cli.commands)


@pytest.mark.parametrize("command", ["token", "custody", "assertion", "check", "csr"])
def test_members_of_the_json_object(
    run: Run, settings: dict[str, str], other_uri: str, command: str
) -> None:
    scripts = PAGE.partition("## For scripts")[2]
    (told,) = re.findall(rf"^\| `{command}` \| (.*) \|$", scripts, re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)`", told))
    more = ["--subject", "CN=bank", "--key", other_uri] if command == "csr" else []
    document = run(command, "--json", *more, **settings).document
    assert set(document) <= named
    for members in document.get("keys") or document.get("steps") or []:
        assert set(members) <= named
