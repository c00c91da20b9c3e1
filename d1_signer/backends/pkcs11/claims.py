# SPDX-License-Identifier: Apache-2.0
"""What a token claims about a key, for the custody report."""

from __future__ import annotations

import contextlib

from pkcs11 import Attribute, Mechanism, SlotFlag, TokenFlag, exceptions as sdk

from d1_signer.backends.pkcs11.keys import FoundKey
from d1_signer.backends.pkcs11.module.cryptoki import shown
from d1_signer.backends.pkcs11.module.file import file_of, sha256_of
from d1_signer.backends.pkcs11.module.life import Module
from d1_signer.backends.pkcs11.session import attributes
from d1_signer.backends.pkcs11.session.session import Session
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.custody.evidence import Evidence, Fact, FactValue

_FLAGS = (
    Attribute.LOCAL,
    Attribute.SENSITIVE,
    Attribute.ALWAYS_SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.NEVER_EXTRACTABLE,
    Attribute.SIGN,
    Attribute.DECRYPT,
    Attribute.DERIVE,
    Attribute.UNWRAP,
    Attribute.ALWAYS_AUTHENTICATE,
)


def evidence(module: Module, session: Session, found: FoundKey, uri: Pkcs11Uri) -> Evidence:
    """What the token claims about the key; the caller is inside the module."""
    private, token = found.private, session.token
    values = {name: attributes.flag(session, private, name) for name in _FLAGS}
    facts = [
        _fact(f"CKA_{name.name}", value, "PKCS#11 attribute") for name, value in values.items()
    ]
    mechanism = attributes.number(session, private, Attribute.KEY_GEN_MECHANISM)
    facts.append(_fact("CKA_KEY_GEN_MECHANISM", _mechanism(mechanism), "PKCS#11 attribute"))
    hardware = bool(token.slot_flags & SlotFlag.HW_SLOT)
    of_token: dict[str, FactValue] = {
        "token label": shown(token.label),
        "token serial": shown(token.serial),
        "token manufacturer": shown(token.manufacturer),
        "token model": shown(token.model),
        "token flags": _flags(token.flags_now()),
        "CKF_HW_SLOT": hardware,
        **_library(module),
        **_file(module),
    }
    facts += [_fact(name, value, "PKCS#11") for name, value in of_token.items()]
    facts.append(_fact("locking", str(module.locking), "d1_signer"))
    exportable = _exportable(
        sensitive=values[Attribute.SENSITIVE], extractable=values[Attribute.EXTRACTABLE]
    )
    never = (
        None if exportable is None else not exportable,
        values[Attribute.LOCAL],  # one that came from elsewhere may still be there
        values[Attribute.ALWAYS_SENSITIVE],
        values[Attribute.NEVER_EXTRACTABLE],
    )
    return Evidence(
        location=uri.location(found.id),
        exportable=exportable,
        generated_in_place=values[Attribute.LOCAL],
        hardware=hardware,
        facts=tuple(facts),
        never_exportable=_all(never),
    )


def _fact(name: str, value: FactValue, source: str) -> Fact:
    return Fact(name=name, value=value, source=source)


def _library(module: Module) -> dict[str, FactValue]:
    with contextlib.suppress(sdk.PKCS11Error):  # it only describes itself
        info = module.cryptoki.info()
        return {
            "library description": shown(info.description),
            "library version": f"{info.version[0]}.{info.version[1]}",
        }
    return {"library description": None, "library version": None}


def _file(module: Module) -> dict[str, FactValue]:
    file = file_of(module.path)
    return {"module path": shown(str(file or module.path)), "module SHA-256": sha256_of(file)}


def _exportable(*, sensitive: bool | None, extractable: bool | None) -> bool | None:
    """PKCS#11 section 4.9: a sensitive key never leaves in clear, an extractable one wrapped."""
    if sensitive is False or extractable is True:
        return True
    return None if sensitive is None or extractable is None else False


def _all(answers: tuple[bool | None, ...]) -> bool | None:
    """Yes where each is, no where one is no, else unknown."""
    if False in answers:
        return False
    return None if None in answers else True


def _mechanism(number: int | None) -> FactValue:
    try:
        return None if number is None else Mechanism(number).name
    except ValueError:
        return f"{number:#x}"


def _flags(flags: int) -> str:
    return " ".join(f"CKF_{flag.name}" for flag in TokenFlag if flags & flag)
