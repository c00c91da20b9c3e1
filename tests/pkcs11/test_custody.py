# SPDX-License-Identifier: Apache-2.0
"""A key that could leave its token once; what a report says of the module; opening anew."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pkcs11 import Attribute, KeyType, Mechanism

from d1_signer.backends.pkcs11.returns import Ckr
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import CustodyError, SignerError, SignerUnavailable
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import Call, Shim
from tests.pkcs11.test_keys import change, make_pair

NEVER = CustodyPolicy(never_exportable=True)
NOW = CustodyPolicy(non_exportable=True, generated_in_place=True)


def test_a_key_that_was_wrapped_out_is_refused(token: SoftHsmToken) -> None:
    def once_extractable(session: Any) -> None:
        template = {Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: True}
        _, private = make_pair(session, "once", b"\x09", private_template=template)
        wrapping = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
        assert wrapping.wrap_key(private, mechanism=Mechanism.AES_KEY_WRAP_PAD)
        private[Attribute.EXTRACTABLE] = False

    change(token, once_extractable)
    uri = token.key_uri("once")
    with open_signer(uri, custody_policy=NOW) as signer:
        evidence = signer.custody().evidence
        assert (evidence.exportable, evidence.never_exportable) == (False, False)
    with pytest.raises(CustodyError, match="never exportable"):
        open_signer(uri, custody_policy=NEVER)
    with pytest.raises(CustodyError, match="never exportable"):
        open_signer(uri, custody_policy=NEVER, isolation="process")


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_key_made_here_never_left(token: SoftHsmToken, isolation: str) -> None:
    with open_signer(token.uri, custody_policy=NEVER, isolation=isolation) as signer:
        report = signer.custody()
        assert report.evidence.never_exportable is True
        facts = {fact.name: fact.value for fact in report.evidence.facts}
        assert facts["module path"] == str(Path(token.module_path).resolve())
        content = Path(token.module_path).read_bytes()
        assert facts["module SHA-256"] == hashlib.sha256(content).hexdigest()
        assert report.made_by is not None
        for _ in range(3):
            signer.sign(b"message")
    with pytest.raises(CustodyError, match="held by hardware"):
        open_signer(token.uri, custody_policy=CustodyPolicy(hardware=True), isolation=isolation)


@pytest.mark.parametrize("attribute", ["164", "165"])
def test_what_the_token_denies_of_a_new_key_is_no_new_key(
    token: SoftHsmToken, shim: Shim, attribute: str
) -> None:
    shim.script(f"attr:{attribute}/3=00")
    uri = token.key_uri("fresh")
    with pytest.raises(SignerError, match="another CKA_") as refused:
        generate_key(uri, module_path=shim.path)
    assert "It was removed" in refused.value.hint
    shim.script("")
    generate_key(uri, module_path=shim.path)


@pytest.mark.parametrize("attribute", ["164", "165"])
def test_what_the_token_does_not_tell_is_unknown(
    token: SoftHsmToken, shim: Shim, attribute: str
) -> None:
    shim.script(f"attr:{attribute}/3=rv:12")
    with open_signer(token.uri, module_path=shim.path) as signer:
        assert signer.custody().evidence.never_exportable is None
    with pytest.raises(CustodyError):
        open_signer(token.uri, custody_policy=NEVER, module_path=shim.path)
    generate_key(token.key_uri("silent"), module_path=shim.path)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_key_that_is_opened_anew_is_held_again(
    token: SoftHsmToken, shim: Shim, isolation: str
) -> None:
    options: dict[str, Any] = {"isolation": isolation, "max_sessions": 1, "timeout": 20}
    with open_signer(token.uri, custody_policy=NEVER, module_path=shim.path, **options) as signer:
        for _ in range(3):
            signer.sign(b"message")
        shim.script("attr:164/3=00")
        signer.sign(b"message")  # its session is the one that was looked at
        if isolation == "process":
            signer._backend._hosts[0].process.kill()  # type: ignore[attr-defined]
            with pytest.raises(SignerUnavailable):
                signer.sign(b"message")
        else:
            shim.fail(Call.SIGN, Ckr.SESSION_HANDLE_INVALID, times=1)
        for _ in range(2):
            with pytest.raises(CustodyError, match="never exportable"):
                signer.sign(b"message", timeout=20)
        if isolation == "none":
            shim.script("")
            signer.sign(b"message")
