# SPDX-License-Identifier: Apache-2.0
"""Changes to the certificates of a statement, and its refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from d1_signer.attestation import AttestationError
from tests.attestation.makers import MAKERS, ROOT, Made
from tests.attestation.pki import Holder, PrivateKey, Settings, certificate, ec_key, pem


def refusal(made: Made, **asked: Any) -> str:
    with pytest.raises(AttestationError) as caught:
        made.verify(**asked)
    error = caught.value
    assert error.code == "attestation"
    assert not error.retryable
    assert error.details["format"] == made.statement.format
    assert "cause" not in error.details, "refused by a check, and not by the guard"
    return error.message


def to(**settings: Any) -> Callable[[Settings], None]:
    """The change that sets fields of a certificate."""

    def change(of: Settings) -> None:
        for name, value in settings.items():
            setattr(of, name, value)

    return change


def with_key(key: PrivateKey) -> Callable[[Settings], None]:
    def change(of: Settings) -> None:
        of.subject = Holder(of.subject.name, key)

    return change


def by_an_impostor(of: Settings) -> None:
    of.issuer = Holder(of.issuer.name, ec_key("impostor"))


def adding(*extension: tuple[str, bool, bytes]) -> Callable[[Settings], None]:
    def change(of: Settings) -> None:
        of.version = "v3"
        of.extensions = [*of.extensions, *extension]
        if of.subject.name.startswith("HSM:") and "PARTN" not in of.subject.name:
            of.ca = True  # a card of version 3 has to be an authority's

    return change


def changed(name: str, role: str, change: Callable[[Settings], None]) -> Made:
    return MAKERS[name]({role: change})


def with_root(made: Made, **settings: Any) -> Made:
    """The same with a certificate of the root, which nobody has to trust."""
    root = certificate(Settings(ROOT, ROOT, **settings))
    statement = replace(made.statement, certificates=(pem(root), *made.statement.certificates))
    return replace(made, statement=statement)
