# SPDX-License-Identifier: Apache-2.0
"""The run-books of HSMs that nobody here has: what they say of this library is so, and the rest has
its source.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest

from d1_signer import open_signer
from d1_signer.backends import pkcs11
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.cli._app import cli
from d1_signer.errors import ConfigurationError

FOLDER = Path(__file__).parents[2] / "docs" / "pkcs11"
NAMES = ("luna", "nshield", "cloudhsm", "yubihsm")
TEXTS = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in NAMES}
SECTIONS = [
    "Install",
    "A user for signing",
    "A key",
    "Check",
    "Failover",
    "What the errors mean",
    "Sessions",
    "Facts worth knowing",
    "Not found",
    "Sources",
]
PARAMETERS = {
    name: set(inspect.signature(getattr(pkcs11, name)).parameters) - {"uri"}
    for name in ("open_backend", "generate_key")
}
TYPES = typing.get_type_hints(pkcs11.open_backend)
FLAGS = {
    name: {flag for parameter in command.params for flag in parameter.opts}
    for name, command in cli.commands.items()
}
# Names before an equals sign that are others': of URIs, of the vendors' files and variables.
OTHERS = {"pkcs11", "connector", "token", "object", "id", "serial"}


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("d1-signer ")]


def uris(text: str) -> list[str]:
    return re.findall(r"pkcs11:[^\s'`\"]+", text)


def chosen(words: list[str]) -> dict[str, Any]:
    """The options of a command, as the backend wants them."""
    given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--option")
    if "--timeout" in words:
        given["timeout"] = words[words.index("--timeout") + 1]
    return {name: converted(name, text) for name, text in given.items()}


def converted(name: str, text: str) -> Any:
    kinds = typing.get_args(TYPES[name]) or (TYPES[name],)
    if int in kinds:
        return int(text, 0)
    return float(text) if float in kinds else text


def calls(text: str) -> list[ast.Call]:
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [node for node in ast.walk(ast.parse("\n".join(blocks))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_first_that_nobody_tried_it(name: str) -> None:
    head = TEXTS[name].partition("\n## ")[0]
    assert "**Not tried here.** Facts" in head
    assert "read in stored copies" in head


@pytest.mark.parametrize("name", NAMES)
def test_it_has_what_an_operator_looks_for(name: str) -> None:
    assert re.findall(r"^## (.*)$", TEXTS[name], re.MULTILINE) == SECTIONS
    assert all(len(section(TEXTS[name], title)) > 100 for title in SECTIONS)
    words = [line[1] for line in commands(TEXTS[name])]
    assert {"generate-key", "public-key", "check", "custody"} <= set(words)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_leads_to_a_source_and_every_source_is_used(name: str) -> None:
    body, _, sources = TEXTS[name].partition("\n## Sources\n")
    listed = [int(number) for number in re.findall(r"^(\d+)\. ", sources, re.MULTILINE)]
    assert listed == list(range(1, len(listed) + 1))
    marks = re.findall(r"\[(\d+(?:, \d+)*)\]", body)
    cited = {int(number) for mark in marks for number in mark.split(", ")}
    assert cited == set(listed)


@pytest.mark.parametrize("name", NAMES)
def test_the_vendors_facts_have_a_source(name: str) -> None:
    for title in ("Install", "A user for signing", "Failover", "Sessions", "Facts worth knowing"):
        assert re.search(r"\[\d", section(TEXTS[name], title)), title


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_flags_exist(name: str) -> None:
    for _, command, *rest in commands(TEXTS[name]):
        assert {word for word in rest if word.startswith("--")} <= FLAGS[command]
    inline = re.findall(r"`d1-signer ([a-z-]+)", TEXTS[name])
    assert set(inline) <= set(cli.commands)


@pytest.mark.parametrize("name", NAMES)
def test_key_uris_can_be_read_and_name_a_module_that_this_library_knows(name: str) -> None:
    found = [Pkcs11Uri.parse(uri) for uri in uris(TEXTS[name])]
    assert len(found) >= 2
    assert {uri.object for uri in found} == {"d1"}
    known = {Path(place) for place in pkcs11._USUAL_PLACES}
    assert {Path(str(uri.module_path)) for uri in found} <= known


@pytest.mark.parametrize("name", NAMES)
def test_options_exist_and_take_the_values_that_are_shown(name: str, tmp_path: Path) -> None:
    """Each set of options is taken up to the module, which is not there."""
    shown = [chosen(words) for words in commands(TEXTS[name])]
    for call in calls(TEXTS[name]):
        assert ast.unparse(call.func) == "open_signer"
        shown.append({str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    assert any(shown)
    uri = f"pkcs11:object=d1?module-path={tmp_path / 'missing.so'}"
    for options in shown:
        with pytest.raises(ConfigurationError) as caught:
            open_signer(uri, pin_source=lambda: "1234", **options)
        assert caught.value.details["step"] == "module"


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_in_the_text_exist(name: str) -> None:
    given = re.findall(r"`([a-z][a-z0-9_]*)=", TEXTS[name])
    assert set(given) <= PARAMETERS["open_backend"] | OTHERS
    bare = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXTS[name]))
    assert bare <= PARAMETERS["open_backend"] | {"signer_unavailable"}


def test_options_of_generate_key_are_its_own() -> None:
    for text in TEXTS.values():
        for words in commands(text):
            if words[1] == "generate-key":
                assert set(chosen(words)) <= PARAMETERS["generate_key"]


def test_the_table_of_devices_leads_to_each() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        (row,) = (line for line in table.splitlines() if f"]({name}.md)" in line)
        assert row.split("|")[3].strip().startswith("no:")
