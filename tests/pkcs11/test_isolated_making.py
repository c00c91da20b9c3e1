# SPDX-License-Identifier: Apache-2.0
"""Making a key with the module in a process of its own: ``generate_key(isolation="process")``."""

from __future__ import annotations

from typing import Any

import pytest

from d1_signer.backends.pkcs11.isolation import child
from d1_signer.errors import (
    ConfigurationError,
    KeyExistsError,
    LoginError,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.signing.opening import generate_key, open_signer
from d1_signer.testing import SoftHsmToken
from tests.pkcs11.shim import ABORT, HANG, Call, Shim


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[child.Host]:
    """Each child that is started."""
    made: list[child.Host] = []
    start = child.Host.__init__

    def counted(self: child.Host, connections: int, **options: Any) -> None:
        made.append(self)
        start(self, connections, **options)

    monkeypatch.setattr(child.Host, "__init__", counted)
    return made


def test_a_key_is_made_in_a_process_that_ends(
    token: SoftHsmToken, shim: Shim, spawned: list[child.Host]
) -> None:
    made = generate_key(
        token.key_uri("made"),
        module_path=shim.path,
        pin_source=lambda: token.pin,
        isolation="process",
    )
    assert spawned[0].process.returncode == 0
    assert (shim.sessions, shim.calls(Call.GENERATE_KEY_PAIR)) == (0, 1)
    with open_signer(made.uri, isolation="process") as signer:
        assert signer.public_key == made.public_key
    with pytest.raises(KeyExistsError):
        generate_key(token.key_uri("made"), isolation="process")
    with pytest.raises(ConfigurationError):
        generate_key(token.key_uri("other"), isolation="thread")


def test_a_module_that_dies_while_it_makes_a_key(
    token: SoftHsmToken, shim: Shim, spawned: list[child.Host]
) -> None:
    shim.fail(Call.GENERATE_KEY_PAIR, ABORT)
    with pytest.raises(SignerUnavailable) as raised:
        generate_key(token.key_uri("made"), module_path=shim.path, isolation="process")
    assert "Look whether the key is there" in raised.value.hint
    shim.fail(Call.GENERATE_KEY_PAIR, HANG)
    with pytest.raises(SignerTimeout) as hung:
        generate_key(token.key_uri("made"), module_path=shim.path, isolation="process", timeout=0.3)
    assert "Look whether the key is there" in hung.value.hint
    for host in spawned:
        host.process.wait(5)


def test_a_wrong_pin_makes_no_key(
    token: SoftHsmToken, shim: Shim, spawned: list[child.Host]
) -> None:
    for _ in range(2):
        with pytest.raises(LoginError):
            generate_key(
                token.key_uri("made"),
                module_path=shim.path,
                pin_source=lambda: "0000-wrong",
                isolation="process",
            )
    assert (len(spawned), shim.calls(Call.LOGIN)) == (1, 1)
