# SPDX-License-Identifier: Apache-2.0
"""Every snippet of every page and docstring: run here as printed, run by another test, or left out
with the reason.

Put in are only what nobody else has: paths, the URLs of servers, the token's module and PIN file,
and names that the text around a snippet says the reader has.
"""

from __future__ import annotations

import ast
import re
import shlex

import click
import pytest

from d1_signer.cli._app import cli
from tests.docs.reading import ROOT, Snippet, modules, snippets
from tests.docs.test_snippets_of_python import RUN as PYTHON
from tests.docs.test_snippets_of_shell import RUN as SHELL

# The beginning of a snippet's key, and the test that takes it from its page.
ELSEWHERE = {
    "README.md: export D1_SIGNER_KEY=": (
        "tests/docs/test_readme.py::test_the_commands_run_in_the_order_of_the_page"
    ),
    **{
        f"README.md: {first}": (
            "tests/docs/test_readme.py::test_the_python_examples_run_in_the_order_of_the_page"
        )
        for first in (
            "from d1_signer import ClientCertificate",
            "from d1_signer import SignerSet",
            "from d1_signer import generate_key",
            "from d1_signer.sandbox",
            "fetcher = TokenFetcher.from_settings",
            "token = ",
            "import httpx",
            "tls_signer = ",
            "signature = ",
        )
    },
    "docs/audit/README.md: tail -n 6": (
        "tests/docs/test_audit_page.py::test_openssl_verifies_a_checkpoint_as_printed"
    ),
    "docs/audit/README.md: head -n 1": (
        "tests/docs/test_audit_page.py::test_the_leaf_of_a_record_as_printed"
    ),
    "docs/cli.md: d1-signer softhsm -- sh": (
        "tests/docs/test_cli_page.py::test_a_check_in_softhsm_and_the_sandbox"
    ),
    "docs/cli.md: d1-signer sandbox -- d1-signer": (
        "tests/docs/test_cli_page.py::test_a_first_token"
    ),
    "docs/cli.md: d1-signer sandbox --fault": (
        "tests/docs/test_cli_page.py::test_trouble_for_a_client"
    ),
    "docs/settings.md: # /etc/d1/production.toml": (
        "tests/docs/test_settings_page.py::test_the_service_reads_the_file_as_printed"
    ),
    "docs/settings.md: from d1_signer": (
        "tests/docs/test_settings_page.py::test_the_service_reads_the_file_as_printed"
    ),
    "docs/settings.md: d1-signer check": (
        "tests/docs/test_settings_page.py::test_the_commands_read_the_file_as_printed"
    ),
    "docs/custody/attestation.md: Run by tests/attestation/test_securosys.py": (
        "tests/attestation/test_securosys.py"
        "::test_the_files_of_the_hsm_become_the_json_as_the_page_says"
    ),
    "docs/cloud/aws.md: {": (
        "tests/backends/test_docs.py::test_policy_for_aws_is_json_with_the_permissions_that_are_used"
    ),
    "docs/cloud/vault.md: bao": "tests/docs/test_snippets_of_shell.py::test_it_runs",
    "docs/custody/attestation.md: Run by tests/attestation/test_tpm_tools.py": (
        "tests/attestation/test_tpm_tools.py::test_a_statement_as_the_page_says"
    ),
    **{
        f"docs/custody/format.md: {first}": (
            "tests/custody/test_bundle.py::test_openssl_verifies_it_as_the_page_prints"
        )
        for first in ("{ printf", "point()")
    },
    **{
        f"docs/custody/tpm.md: {first}": (
            "tests/pkcs11/test_tpm_custody.py::test_from_the_tpm_to_the_auditor"
        )
        for first in ("umask", "auth=", "cd /etc/d1", "d1-signer custody verify")
    },
    "docs/custody/tpm.md: tpm2_load": (
        "tests/pkcs11/test_tpm_custody.py::test_a_key_that_was_there_already"
    ),
    **{
        f"docs/{first}": (
            "tests/token/fleet/test_examples.py::test_the_pages_show_the_examples_as_they_are"
        )
        for first in (
            "fleet.md: examples/fleet_fetcher.py",
            "fleet.md: examples/gunicorn_app.py",
            "fleet.md: examples/celery_app.py",
            "fleet.md: examples/fastapi_app.py",
            "observability.md: examples/healthz.py health",
            "rotation.md: examples/rotation.py rotate",
            "rotation.md: examples/rotation.py fail_over",
            "rotation.md: examples/gunicorn_settings.py",
        )
    },
    **{
        f"docs/onboarding.md: {mark}\n": (
            "tests/docs/test_onboarding.py::test_the_whole_way_works_as_printed"
        )
        for mark in ("keys", "softhsm", "send", "prove", "renew", "renewed")
    },
    "docs/pkcs11/operation.md: from d1_signer": (
        "tests/pkcs11/test_pin_files.py::test_status_that_a_supervisor_gives_up_on"
    ),
    "docs/pkcs11/operation.md: # /etc/systemd": (
        "tests/pkcs11/test_pin_files.py::test_status_that_a_supervisor_gives_up_on"
    ),
    "docs/pkcs11/tpm.md: export TPM2TOOLS": (
        "tests/pkcs11/test_tpm.py::test_set_up_as_the_page_says"
    ),
    "docs/pkcs11/tpm.md: tpm2_ptool": "tests/pkcs11/test_tpm.py::test_what_the_page_says_of_tools",
    "docs/pkcs11/tpm.md: tpm2_getcap": (
        "tests/pkcs11/test_tpm.py::test_wrong_pins_lock_the_tpm_as_the_page_says"
    ),
    "docs/releases.md: verify": "tests/project/test_release.py::test_verified_as_the_documents_say",
    "docs/releases.md: build": "tests/project/test_release.py::test_verified_as_the_documents_say",
    "docs/tls.md: keys": "tests/docs/test_tls_page.py::test_the_whole_way_works_as_printed",
    "docs/tls.md: export": "tests/docs/test_tls_page.py::test_the_whole_way_works_as_printed",
    "docs/tls.md: python": "tests/docs/test_tls_page.py::test_the_whole_way_works_as_printed",
    "docs/tls.md: asyncio": "tests/docs/test_tls_page.py::test_the_example_of_asyncio_runs",
    "docs/cli.md: $ d1-signer status": (
        "tests/docs/test_settings_page.py::test_the_status_of_a_fleet_as_the_other_page_prints_it"
    ),
    "docs/cli.md: until d1-signer status": (
        "tests/docs/test_settings_page.py::test_the_status_of_a_fleet_as_the_other_page_prints_it"
    ),
    "docs/cli.md: Waiting for": "tests/cli/test_waiting.py::test_a_wait_is_told_on_a_terminal",
    "docs/rotation.md: D1_CONFIG=": (
        "tests/token/fleet/test_rotation.py::test_the_commands_of_the_page_rotate"
    ),
}

_INSTALLS = "installs from an index; tests/project/test_wheel.py installs what is built here"
_DEVICE = "needs the vendor's device; tests/docs/test_run_books.py takes each up to the module"
_LUNA = (
    "luna.md: export D1_SIGNER_KEY='pkcs11:token=PARTITION;object=d1?module-path="
    "/usr/safenet/lunaclient/lib/libCryptoki2_64.so&pin-source=file:/etc/d1/"
)
LEFT_OUT = {
    'README.md: pip install "d1-signer[pkcs11,cli]"': _INSTALLS,
    'README.md: pip install "d1-signer[cli,pkcs11,sandbox]"': (
        "installs from an index; tests/project/test_installed.py runs its commands from a wheel"
    ),
    'docs/cli.md: pip install "d1-signer[cli,pkcs11]"': _INSTALLS,
    "docs/audit/README.md: d1-signer audit collect": (
        "needs the trails of two hosts: tests/cli/test_audit_collect.py has them"
    ),
    "docs/audit/README.md: d1-signer audit stamp": (
        "needs a time-stamping authority: tests/cli/test_audit_stamp.py has one on loopback"
    ),
    "docs/audit/README.md: openssl ts": (
        "needs that stamp: run by tests/cli/test_audit_stamp.py, over its own files"
    ),
    "docs/audit/README.md: d1-signer audit reconcile": (
        "needs logs of OpenBao and AWS: tests/cli/test_audit_reconcile.py has them"
    ),
    "docs/backends.md: [project.entry-points": (
        "goes into a distribution: tests/plugin_example is one with these lines"
    ),
    "docs/cli.md: d1-signer check --option": (
        "a device each; tests/cli/test_options.py gives such options to commands"
    ),
    "docs/cli.md: d1-signer custody --key": (
        "asks at a terminal: tests/pkcs11/test_pin_files.py types a PIN"
    ),
    "docs/cli.md: d1-signer custody --require": (
        "its second line needs a statement of Luna's: tests/cli/test_custody.py tries the words"
    ),
    "docs/cloud/gcp.md: pip": (
        "Google's cloud has no server of others; tests/backends/test_docs.py runs the lines "
        "against a double, whose endpoint stands in the URI"
    ),
    "docs/cloud/vault.md: from pathlib": (
        "needs a key in an HSM behind Vault: tests/backends/vault has one that stands for it"
    ),
    **{
        f"docs/custody/README.md: from d1_signer import {name}": (
            "needs a Luna that has signed a statement; tests/custody has statements of its own"
        )
        for name in ("open_signer", "Assurance")
    },
    "docs/custody/attestation.md: import time": "needs a statement under the vendor's root",
    "d1_signer/attestation/__init__.py: import time": "needs a statement under the vendor's root",
    "docs/custody/attestation.md: gcloud": "needs Google's cloud, and its command",
    "docs/custody/attestation.md: cmu": "needs a Luna, and its command",
    "docs/custody/attestation.md: ykman": "needs a YubiKey",
    "docs/fleet.md: [uwsgi]": (
        "lines of a configuration; tests/token/fleet/test_servers.py gives them to uWSGI"
    ),
    "docs/fleet.md: from gevent": (
        "patches the process; tests/token/fleet/test_servers.py gives these lines to gunicorn"
    ),
    **{
        f"docs/pkcs11/{name}.md: {first}": _DEVICE
        for name in ("cloudhsm", "luna", "nshield", "yubihsm")
        for first in ("pkcs11:", "signer = open_signer(")
    },
    **{
        f"docs/pkcs11/{first}": _DEVICE
        for first in (
            "cloudhsm.md: export D1_SIGNER_KEY",
            "cloudhsm.md: d1-signer check",
            f"{_LUNA}officer-pin",
            f"{_LUNA}user-pin",
            "nshield.md: export CKNFAST",
            "nshield.md: d1-signer check",
            "yubihsm.md: export YUBIHSM",
            "yubihsm.md: d1-signer check",
        )
    },
    **{
        f"docs/pkcs11/{name}.md: pkcs11:": "the form of a URI; tests/pkcs11/test_uri.py reads such"
        for name in ("README", "opencryptoki")
    },
    "docs/pkcs11/tpm.md: dpkg-divert": "moves a file of Debian's package on the reader's machine",
    "docs/pkcs11/tpm.md: open_signer(uri": "tests/pkcs11/test_tpm.py opens keys by this call",
    "docs/custody/attestation.md: # SHA-256": (
        "lines of a file; tests/attestation/test_verifier.py reads such"
    ),
    "docs/custody/attestation.md: yubihsm> attest": "needs a YubiHSM, and its shell",
    "docs/audit/format.md: — ORIGIN": "the form of a line; tests/audit/test_note.py reads such",
    "docs/architecture.md: d1_signer/": (
        "a tree; tests/docs/test_architecture.py compares it with the folders"
    ),
    "README.md: your backend": "a picture",
    "softhsm/README.md: d1-signer softhsm -- COMMAND": "a form with words to put in, no command",
    "d1_signer/audit/folder.py: lock ": "a list of files, no code",
    "d1_signer/backends/pkcs11/module/gate.py: call = ": "three lines of its own code, explained",
    "d1_signer/errors.py: D1SignerError": "the tree; tests/facts/test_errors.py compares it",
}
ALL = snippets()
TABLES = (PYTHON, SHELL, ELSEWHERE, LEFT_OUT)


def places(snippet: Snippet) -> list[str]:
    """Where a snippet is dealt with; a snippet of one line only may be meant by its end."""
    begins = f"{snippet.key}\n"
    return [first for table in TABLES for first in table if begins.startswith(first)]


@pytest.mark.parametrize("snippet", ALL, ids=lambda snippet: snippet.key[:70])
def test_it_runs_or_there_is_a_reason(snippet: Snippet) -> None:
    assert len(places(snippet)) == 1


def test_each_entry_is_for_one_snippet_that_is_there() -> None:
    """So that a new snippet needs one of its own."""
    keys = [f"{snippet.key}\n" for snippet in ALL]
    assert len({*keys}) == len(keys)
    for table in TABLES:
        for first in table:
            assert sum(key.startswith(first) for key in keys) == 1, first


def test_no_code_is_shown_in_another_form() -> None:
    """Nothing that a reader would type stands where snippets are not looked for."""
    for page in {snippet.page for snippet in ALL if snippet.page.endswith(".md")}:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^[ >]*(?:[-*] +|\d+\. +)?(?:`{3,}|~{3,})", text, re.MULTILINE)
        assert len(fences) == 2 * sum(snippet.page == page for snippet in ALL), page
        assert not re.search(r"\n\n(?: {4}|\t)\S", unfenced(text)), page
        assert "<pre" not in text, page
    for _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                told = ast.get_docstring(node) or ""
                assert not re.search(r">>> |```|^\.\. code", told, re.MULTILINE), told[:60]


def unfenced(text: str) -> str:
    return re.sub(r"^(```).*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("first", ELSEWHERE)
def test_the_other_test_is_there_and_reads_the_page(first: str) -> None:
    path, _, function = ELSEWHERE[first].partition("::")
    source = (ROOT / path).read_text(encoding="utf-8")
    defined = {n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}
    assert function in defined
    page = first.partition(": ")[0]
    assert page.rpartition("/")[2].removesuffix(".md") in source


@pytest.mark.parametrize("first", LEFT_OUT)
def test_tests_that_a_reason_names_are_there(first: str) -> None:
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", LEFT_OUT[first]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "snippet", [each for each in ALL if each.language == "python"], ids=lambda each: each.key[:70]
)
def test_python_is_python(snippet: Snippet) -> None:
    compile(snippet.text, snippet.key, "exec")


def typed(text: str) -> list[list[str]]:
    """The words of each of our commands, wherever in a line it stands."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word == "d1-signer" or not set(word) - set("();<>|&\n"):
            commands.append([])
        commands[-1].append(word)
    return [words[1:] for words in commands if words[:1] == ["d1-signer"]]


def test_commands_that_are_left_out_have_these_names_and_options() -> None:
    left = [each for each in ALL if places(each)[0] in LEFT_OUT and each.language == "sh"]
    commands = [words for snippet in left for words in typed(snippet.text)]
    assert len(commands) > 15
    for words in commands:
        command: click.Command = cli
        rest = words
        while isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        assert not isinstance(command, click.Group) or command is not cli, words
        known = {flag for parameter in command.params for flag in parameter.opts}
        given = {word for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known, words
        needed = [p for p in command.params if p.required and isinstance(p, click.Option)]
        for option in needed:
            assert given & {*option.opts} or option.envvar, words
