# SPDX-License-Identifier: Apache-2.0
"""Finding the one token that a URI describes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from d1_signer.backends.pkcs11.failures import Recovery, recovery_for, told
from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki, shown
from d1_signer.backends.pkcs11.module.token import Slots, Token, read_slots
from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.errors import AmbiguousKeyError, KeyNotFoundError
from d1_signer.logfmt import told as pairs

_log = logging.getLogger(__name__)

_SHOWN = 10  # candidates listed in an error
_NAMES_OF_A_TOKEN = ("token", "serial")


def find_token(cryptoki: Cryptoki, uri: Pkcs11Uri) -> Token:
    """Find the one token that the URI describes; the caller is inside the module.

    Raises:
        KeyNotFoundError: None fits.
        AmbiguousKeyError: More than one fits.
        pkcs11.PKCS11Error: No slot can be read.
    """
    seen = read_slots(cryptoki)
    for slot_id, failure in seen.failures.items():
        _log.info("pkcs11.slot_passed_over slot=%d answer=%s", slot_id, told(failure))
    if seen.failures and not seen.tokens and _may_be_silent(uri, seen):
        raise next(iter(seen.failures.values()))
    fitting = [token for token in seen.tokens if _fits(token, uri)]
    if uri.library_version is not None or _library_texts(uri):
        fitting = fitting if _library_fits(cryptoki, uri) else []
    if len(fitting) == 1:
        found = fitting[0]
        _log.debug(
            "pkcs11.token_found %s",
            pairs(
                {
                    "token": found.label,
                    "serial": found.serial,
                    "slot": found.slot_id,
                    "model": found.model,
                }
            ),
        )
        return found
    if fitting:
        raise AmbiguousKeyError(
            f"More than one token fits {uri.token_location()}; seen: {_listed(fitting)}.",
            hint="Name the token by its label or serial number in the key URI.",
            details={"step": "token", "tokens": len(fitting)},
        )
    raise _none_fits(uri, seen)


def _none_fits(uri: Pkcs11Uri, seen: Slots) -> KeyNotFoundError:
    failures = seen.failures
    details: dict[str, str | int | float] = {"step": "token", "tokens": 0}
    silent = ""
    if failures:
        details["silent_slots"] = listed(f"{slot} ({told(f)})" for slot, f in failures.items())
        silent = f"; slots that do not tell: {details['silent_slots']}"
    return KeyNotFoundError(
        f"No token fits {uri.token_location()}; seen: {_listed(seen.tokens)}{silent}.",
        hint="Name the token by its label or serial number in the key URI.",
        retryable=_may_be_silent(uri, seen),
        details=details,
    )


def _may_be_silent(uri: Pkcs11Uri, seen: Slots) -> bool:
    """Whether a slot that does not tell now may be the right one, and tell later."""
    return any(
        uri.slot_id in {None, slot_id} and recovery_for(failure) is not Recovery.NONE
        for slot_id, failure in seen.failures.items()
    )


def _fits(token: Token, uri: Pkcs11Uri) -> bool:
    if uri.slot_id not in {None, token.slot_id}:
        return False
    # One that was never initialised holds no key; that it has a name says that it was.
    named = uri.slot_id is not None or any(uri.texts.get(name) for name in _NAMES_OF_A_TOKEN)
    if not (token.initialized or named):
        return False
    texts = {
        "token": token.label,
        "manufacturer": token.manufacturer,
        "serial": token.serial,
        "model": token.model,
        "slot-description": token.slot_description,
        "slot-manufacturer": token.slot_manufacturer,
    }
    return all(_same(uri, name, text) for name, text in texts.items())


def _same(uri: Pkcs11Uri, name: str, text: str) -> bool:
    """Whether the URI asks for this text; blanks at the end are padding on either side."""
    wanted = uri.texts.get(name)
    return wanted is None or wanted.rstrip(" ") == text.rstrip(" ")


def _library_texts(uri: Pkcs11Uri) -> bool:
    return bool({"library-manufacturer", "library-description"} & uri.texts.keys())


def _library_fits(cryptoki: Cryptoki, uri: Pkcs11Uri) -> bool:
    info = cryptoki.info()
    major, minor = uri.library_version or info.version
    return (
        _same(uri, "library-manufacturer", info.manufacturer)
        and _same(uri, "library-description", info.description)
        and major == info.version[0]
        and minor in {None, info.version[1]}
    )


def _listed(tokens: Iterable[Token]) -> str:
    return listed(map(_text, tokens))


def _text(token: Token) -> str:
    label, serial = shown(token.label), shown(token.serial)
    # A device may have anything in it.
    told = [f"serial {repr(serial)[1:-1]}"] if serial else []
    told += [f"slot {token.slot_id}", *([] if token.initialized else ["not initialised"])]
    return f"{repr(label) if label else 'no label'} ({', '.join(told)})"


def listed(texts: Iterable[str]) -> str:
    """What was seen, for an error's text."""
    every = list(texts)
    more = f", and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(every[:_SHOWN]) or "none") + more
