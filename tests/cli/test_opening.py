# SPDX-License-Identifier: Apache-2.0
"""Which steps of an opening are told as passed: those that an error, or its absence, proves."""

from __future__ import annotations

import pytest

from d1_signer.cli._opening import Opening
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidInputError,
    KeyNotFoundError,
    KeyUriError,
    LoginError,
    SecretSourceError,
    SignerError,
    SignerTimeout,
    SignerUnavailable,
)

URI = "pkcs11:token=bank;object=d1?pin-source=file:/etc/d1/pin"
STEPS = ("module", "token", "login", "key")


def told(opening: Opening, error: D1SignerError | None) -> str:
    """The steps that are told as passed, then the one that failed."""
    at = "" if error is None else opening.stopped_at(error)
    steps = (*opening.steps, "signature", "")
    left_out = opening.not_taken(error)
    passed = [step for step in steps[: steps.index(at)] if step and step not in left_out]
    return " ".join([*passed, f"!{at}" if at else "."])


def at(kind: type[D1SignerError], step: str, **more: str) -> D1SignerError:
    return kind("It failed.", details={"step": step, **more})


@pytest.mark.parametrize(
    ("error", "here", "in_a_process"),
    [
        (at(ConfigurationError, "module"), "!module", "!module"),
        (at(SignerUnavailable, "module"), "!module", "!module"),
        (at(KeyNotFoundError, "token"), "module !token", "module !token"),
        (at(SignerUnavailable, "token", pkcs11="DeviceError"), "module !token", "module !token"),
        (at(LoginError, "login", pkcs11="PinLocked"), "module token !login", "module token !login"),
        # The PIN's source is read before the token is looked for, or before there is a process.
        (at(SecretSourceError, "login"), "module !login", "!login"),
        # A PIN that was refused before: the process may not have been started.
        (at(LoginError, "login"), "module token !login", "!login"),
        (at(SignerTimeout, "login"), "module token !login", "module token !login"),
        (at(KeyNotFoundError, "key"), "module token login !key", "module token login !key"),
        (
            at(SignerUnavailable, "signature"),
            "module token login key !signature",
            "module token login key !signature",
        ),
        # Nothing is known of an error that names no step, or one that is none.
        (KeyUriError("It cannot be read."), "!key", "!key"),
        (SignerError("A defect."), "!key", "!key"),
        (at(SignerError, "elsewhere"), "!key", "!key"),
        (None, "module token login key signature .", "module token login key signature ."),
    ],
)
def test_pkcs11(error: D1SignerError | None, here: str, in_a_process: str) -> None:
    assert told(Opening(uri=URI, options={}), error) == here
    assert told(Opening(uri=URI, options={"isolation": "process"}), error) == in_a_process


@pytest.mark.parametrize(
    ("uri", "options", "logs_in"),
    [
        (URI, {}, True),
        ("pkcs11:token=bank;object=d1?module-name=x&pin-value=1234", {}, True),
        ("pkcs11:token=bank;object=d1?pin%2Dsource=prompt", {}, True),
        ("pkcs11:token=bank;object=d1", {"pin_source": "prompt"}, True),
        ("pkcs11:token=bank;object=d1", {"protected_authentication_path": "true"}, True),
        ("pkcs11:token=bank;object=d1", {"protected_authentication_path": "false"}, False),
        ("pkcs11:token=pin-source;object=d1?module-name=x", {}, False),
    ],
)
def test_a_login_takes_a_pin(uri: str, options: dict[str, str], *, logs_in: bool) -> None:
    opening = Opening(uri=uri, options=options)
    for error in (None, at(KeyNotFoundError, "key")):
        assert ("login" in told(opening, error)) is logs_in


@pytest.mark.parametrize("scheme", ["file", "awskms", "gcpkms", "hashivault", "plug-in"])
@pytest.mark.parametrize("error", [at(SecretSourceError, "login"), SignerError("x"), None])
def test_other_backends_have_one_step(scheme: str, error: D1SignerError | None) -> None:
    opening = Opening(uri=f"{scheme}:x", options={})
    assert opening.steps == ("key",)
    assert told(opening, error) == ("!key" if error else "key signature .")


def test_a_refused_option_is_none_of_the_steps() -> None:
    opening = Opening(uri=URI, options={"locking": "nonsense"})
    assert opening.is_wrong_option(ConfigurationError("locking is none of these."))
    assert opening.is_wrong_option(InvalidInputError("user_type is no number."))
    for other in (at(ConfigurationError, "module"), KeyUriError("x"), SecretSourceError("x")):
        assert not opening.is_wrong_option(other)
    untold = Opening(uri=URI, options={})
    assert not untold.is_wrong_option(ConfigurationError("No region is given."))
