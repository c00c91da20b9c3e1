# SPDX-License-Identifier: Apache-2.0
"""Tokens: where they come from, how they are kept alive, and what happens when one is refused."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from d1_signer import errors
from d1_signer.backends.vault.backend import VaultBackend
from d1_signer.backends.vault.http import HttpClient
from d1_signer.backends.vault.logins import Login, app_role
from d1_signer.backends.vault.secret_ids import Known, known
from d1_signer.backends.vault.settings import read_settings
from d1_signer.backends.vault.tokens import Tokens
from d1_signer.secret import Secret
from d1_signer.signing.opening import open_signer
from d1_signer.signing.signer import Signer
from tests.backends.vault.conftest import signs
from tests.owners import give_away
from tests.servers import vault
from tests.servers.fault_proxy import Answer, Dropped, FaultProxy
from tests.servers.vault import calls, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOGIN = "POST auth/approle/login"
RENEWAL = "POST auth/token/renew-self"


def _wait_for(condition: Callable[[], object], seconds: float = 40.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def _secret_file(folder: Path, text: str, name: str = "secret") -> Path:
    file = folder / name
    file.touch(0o600)
    file.write_text(text)
    return file


@contextlib.contextmanager
def _by_approle(
    server: vault.Vault, proxy: FaultProxy, name: str, **role: object
) -> Iterator[Signer]:
    role_id, secret_id = server.make_approle(name, **role)
    with open_signer(
        f"hashivault://d1?role-id={role_id}", address=proxy.url, secret_id_source=lambda: secret_id
    ) as signer:
        yield signer


# -- tokens that somebody gives -------------------------------------------------------------------


def test_token_from_the_users_file(
    token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VAULT_TOKEN")
    with pytest.raises(errors.LoginError, match="no Vault token"):
        open_signer("hashivault://d1")
    file = _secret_file(tmp_path, token, ".vault-token")
    with open_signer("hashivault://d1") as signer:
        signs(signer)
    file.chmod(0o644)
    with pytest.raises(errors.SecretSourceError):
        open_signer("hashivault://d1")


def test_no_token_is_sent_where_none_is_wanted(proxy: FaultProxy) -> None:
    with pytest.raises(errors.LoginError, match="no Vault token"):
        open_signer("hashivault://d1?token-source=none", address=proxy.url)
    assert "X-Vault-Token" not in proxy.requests[-1].headers


def test_token_file_of_the_kubernetes_injector(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _secret_file(tmp_path, token)
    file.chmod(0o640)
    owner = give_away(file, monkeypatch)
    with pytest.raises(errors.SecretSourceError, match=f"uid {owner}") as refused:
        open_signer(f"hashivault://d1?token-source=file:{file}")
    assert "trusted_owner" in refused.value.hint
    with open_signer(f"hashivault://d1?token-source=file:{file}&trusted-owner={owner}") as signer:
        signs(signer)
    with open_signer("hashivault://d1", token_source=f"file:{file}", trusted_owner=owner) as signer:
        signs(signer)
    file.chmod(0o660)
    with pytest.raises(errors.SecretSourceError, match="0660"):
        open_signer(f"hashivault://d1?token-source=file:{file}&trusted-owner={owner}")


def test_time_in_which_a_token_is_typed_does_not_count(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = 0.0
    monotonic = time.monotonic

    def typed() -> str:
        nonlocal offset
        offset = 100.0
        return token

    monkeypatch.setattr(
        "d1_signer.transport.deadlines.time.monotonic", lambda: monotonic() + offset
    )
    with open_signer("hashivault://d1", token_source=typed) as signer:
        signs(signer)


def test_token_that_an_agent_renews_is_read_again(
    server: vault.Vault, token: str, tmp_path: Path
) -> None:
    first = server.make_token()
    file = _secret_file(tmp_path, first)
    with open_signer(f"hashivault://d1?token-source=file:{file}") as signer:
        server.api("POST", "auth/token/revoke", token=first)
        with pytest.raises((errors.AccessDeniedError, errors.LoginError)):
            signer.sign(b"m")
        file.write_text(token)
        signs(signer)


def test_token_without_the_policy_is_denied(server: vault.Vault) -> None:
    poor = server.make_token("default")
    with pytest.raises(errors.AccessDeniedError) as refused:
        open_signer("hashivault://d1", token_source=lambda: poor)
    assert refused.value.details["status"] == 403
    assert poor not in str(refused.value)


@pytest.mark.parametrize(
    "token", ["tok\u00e9n\nX-Evil: 1-aaaaaaaa", "hvs.X-Evil\n", "hvs.X-Evil\r", " hvs.X-Evil", " "]
)
def test_token_that_is_no_header_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", token)
    for given in (None, lambda: token):
        with pytest.raises(errors.SecretSourceError, match="Vault token has a blank") as refused:
            open_signer("hashivault://d1", token_source=given)
        assert "X-Evil" not in repr(refused.value.to_dict())


def test_given_token_is_renewed(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._FIRST_LOOK", 0.0)
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.02)
    given = server.make_token("signer", period="60s")
    with open_signer("hashivault://d1", address=proxy.url, token_source=lambda: given) as signer:
        _wait_for(lambda: calls(proxy).count(RENEWAL) >= 2)
        signs(signer)
    told = server.api("POST", "auth/token/lookup", token=given)["data"]
    assert told["last_renewal_time"] > told["creation_time"]


@pytest.mark.parametrize(
    "settings", [{"num_uses": 9}, {"renewable": False}, {"no_default_policy": True}], ids=str
)
def test_given_token_that_cannot_be_renewed_is_left_alone(
    server: vault.Vault,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._FIRST_LOOK", 0.0)
    given = server.make_token(ttl="1h", **settings)
    with open_signer("hashivault://d1", address=proxy.url, token_source=lambda: given) as signer:
        _wait_for(lambda: "GET auth/token/lookup-self" in calls(proxy))
        for _ in range(5):
            signs(signer)
    assert RENEWAL not in calls(proxy)
    assert calls(proxy).count("GET auth/token/lookup-self") == 1


def test_short_use_of_a_given_token_asks_nothing_more(signer: Signer, proxy: FaultProxy) -> None:
    signs(signer)
    signer.close()
    assert calls(proxy) == ["GET transit/keys/d1", "POST transit/sign/d1/sha2-256"]


# -- renewal of what was logged in for ------------------------------------------------------------


def _tokens(signer: Signer) -> Tokens:
    assert isinstance(signer._backend, VaultBackend)
    return signer._backend._clients.get()._tokens


def test_token_is_renewed_ahead_of_its_end_so_that_a_single_use_secret_id_is_enough(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At one second of twenty, so that a slow machine does not reach their end.
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.05)
    with _by_approle(
        server, proxy, "single-use", token_ttl="20s", token_max_ttl="1h", secret_id_num_uses=1
    ) as signer:
        first = _tokens(signer)._held
        assert first is not None
        _wait_for(lambda: calls(proxy).count(RENEWAL) >= 2)
        _wait_for(lambda: (_tokens(signer)._held or first).ends > first.ends)
        signs(signer)
        assert calls(proxy).count(LOGIN) == 1


def test_new_login_comes_ahead_of_the_end_of_a_tokens_greatest_life(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.05)
    with _by_approle(server, proxy, "short", token_ttl="20s", token_max_ttl="20s") as signer:
        _wait_for(lambda: calls(proxy).count(LOGIN) >= 2)
        signs(signer)
        # Nothing was refused: a refused request would have been sent twice.
        signed = [call for call in calls(proxy) if "/sign/" in call]
        assert len(signed) == 1


def test_token_is_used_to_its_end_where_the_secret_id_is_used_up(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.02)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._SHORTEST_PAUSE", 0.05)
    with _by_approle(
        server, proxy, "used-up", token_ttl="60s", token_max_ttl="60s", secret_id_num_uses=1
    ) as signer:
        _wait_for(lambda: calls(proxy).count(RENEWAL) >= 4)
        signs(signer)
        assert calls(proxy).count(LOGIN) == 2  # the second was refused, and not sent again
        held = _tokens(signer)._held
        assert held is not None
        assert held.token is not None
        server.api("POST", "auth/token/revoke", token=held.token.reveal())
        _tokens(signer)._source.interval = 0.0  # type: ignore[misc]
        with pytest.raises(errors.SignerError, match="secret id") as refused:
            signer.sign(b"m")
        assert not refused.value.retryable
        assert calls(proxy).count(LOGIN) == 2


def test_renewal_goes_on_where_vault_is_away_for_a_while(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.02)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._TIME_TO_RENEW", 0.3)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._SHORTEST_PAUSE", 0.05)
    with _by_approle(server, proxy, "away", token_ttl="50s", token_max_ttl="1h") as signer:
        first = _tokens(signer)._held
        assert first is not None

        def away(request: Any, forward: Any) -> Answer:
            if "renew-self" in request.path:
                return refusal(503, "Vault is sealed")(request, forward)
            return forward(request)  # type: ignore[no-any-return]

        proxy.fault = away
        _wait_for(lambda: calls(proxy).count(RENEWAL) >= 3)
        signs(signer)
        proxy.fault = None
        _wait_for(lambda: (_tokens(signer)._held or first).ends > first.ends)
        assert calls(proxy).count(LOGIN) == 1


def test_no_more_uses_are_taken_than_a_token_has(server: vault.Vault, proxy: FaultProxy) -> None:
    with _by_approle(server, proxy, "counted", token_num_uses=3) as signer:
        for _ in range(10):
            signs(signer)
    asked = calls(proxy)
    assert asked.count(LOGIN) == 4
    assert len(asked) == 11 + 4  # none was refused and sent again


def test_uses_are_counted_over_threads(server: vault.Vault, proxy: FaultProxy) -> None:
    with (
        _by_approle(server, proxy, "counted-threads", token_num_uses=5) as signer,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda _: signs(signer), range(40)))
    assert len([call for call in calls(proxy) if "/sign/" in call]) == 40


def test_thread_that_looks_after_the_token_ends_with_the_signer(server: vault.Vault) -> None:
    role_id, secret_id = server.make_approle("closing")
    before = {thread for thread in threading.enumerate() if "vault-token" in thread.name}
    signer = open_signer("hashivault://d1", role_id=role_id, secret_id_source=lambda: secret_id)
    signs(signer)
    own = {thread for thread in threading.enumerate() if "vault-token" in thread.name} - before
    assert len(own) == 1
    signer.close()
    _wait_for(lambda: not any(thread.is_alive() for thread in own))


# -- AppRole --------------------------------------------------------------------------------------


def test_threads_share_one_login(server: vault.Vault, proxy: FaultProxy) -> None:
    with _by_approle(server, proxy, "threads") as signer, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: signs(signer), range(64)))
    assert calls(proxy).count(LOGIN) == 1


def test_approle_token_that_was_revoked_is_replaced_once(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    with _by_approle(server, proxy, "revoked") as signer:
        headers = next(r.headers for r in reversed(proxy.requests) if "X-Vault-Token" in r.headers)
        server.api("POST", "auth/token/revoke", token=headers["X-Vault-Token"])
        # A moment after a login there is no other: a missing policy must not become a login storm.
        for _ in range(3):
            with pytest.raises((errors.AccessDeniedError, errors.LoginError)):
                signer.sign(b"m")
        assert calls(proxy).count(LOGIN) == 1
        _tokens(signer)._source.interval = 0.0  # type: ignore[misc]
        signs(signer)
        assert calls(proxy).count(LOGIN) == 2


def test_refused_approle_is_a_login_error_that_names_the_part(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, _ = server.make_approle("mine")
    for role, secret in ((role_id, "wrong-secret-id"), ("wrong-role-id", "wrong-secret-id")):
        with pytest.raises(errors.LoginError) as refused:
            open_signer(
                "hashivault://d1",
                address=proxy.url,
                role_id=role,
                secret_id_source=lambda s=secret: s,
            )
        assert "wrong-secret-id" not in repr(refused.value.to_dict())
        assert "secret id" in refused.value.hint
        assert "role id" in refused.value.hint
        assert refused.value.details["phase"] == "credentials"
        assert refused.value.details["endpoint"] == proxy.url.removeprefix("http://")


def test_refused_secret_id_is_sent_once_until_its_source_gives_another(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, secret_id = server.make_approle("storm")
    now = ["no-such-secret-id"]
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: now[0]}
    for _ in range(20):
        with pytest.raises(errors.LoginError, match=r"secret ID|refused .* before"):
            open_signer("hashivault://d1", address=proxy.url, **options)
    assert calls(proxy).count(LOGIN) == 1
    now[0] = secret_id
    with open_signer("hashivault://d1", address=proxy.url, **options) as signer:
        signs(signer)
    assert calls(proxy).count(LOGIN) == 2


def test_threads_send_a_refused_secret_id_once(server: vault.Vault, proxy: FaultProxy) -> None:
    role_id, _ = server.make_approle("storm-of-threads")
    http = HttpClient(read_settings(proxy.url))
    tokens = Tokens(app_role(role_id, lambda: "another-wrong-id", "approle"))

    def fail() -> str:
        with pytest.raises(errors.LoginError) as refused:
            tokens.current(http, time.monotonic() + 30)
        return refused.value.code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: fail(), range(64))) == {"login"}
    assert calls(proxy).count(LOGIN) == 1


def test_signers_that_are_opened_together_send_a_refused_secret_id_once(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, right = server.make_approle("storm-of-signers")

    def slowly(request: Any, forward: Any) -> Answer:
        if "approle/login" in request.path:
            threading.Event().wait(0.2)  # all of them are here by now, but for one lock
        return forward(request)  # type: ignore[no-any-return]

    proxy.fault = slowly

    def fail(number: int) -> str:
        # The same Vault, however its address is written.
        address = proxy.url + "/" * (number % 2)
        with pytest.raises(errors.LoginError) as refused:
            open_signer(
                "hashivault://d1",
                address=address,
                role_id=role_id,
                secret_id_source=lambda: "the-same-wrong-id",
                timeout=30,
            )
        return refused.value.code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fail, range(8))) == {"login"}
    assert len([call for call in calls(proxy) if LOGIN in call]) == 1
    # The role is not locked for the others.
    with open_signer("hashivault://d1", role_id=role_id, secret_id_source=lambda: right) as signer:
        signs(signer)
    assert not known._locks


def test_threads_that_wait_for_a_login_share_its_failure(proxy: FaultProxy) -> None:
    http = HttpClient(read_settings(proxy.url))
    tokens = Tokens(app_role("role", lambda: "an-id-that-is-lost", "approle"))
    waiting = threading.Semaphore(0)
    others = 7

    first = iter([True])

    def lost(*_: object) -> Answer:
        for _thread in range(others) if next(first, False) else ():
            waiting.acquire(timeout=30)
        raise Dropped

    proxy.fault = lost

    def fail(_: int) -> str:
        waiting.release()
        with pytest.raises(errors.SignerUnavailable) as failure:
            tokens.current(http, time.monotonic() + 60)
        return type(failure.value).__name__

    with ThreadPoolExecutor(others + 1) as pool:
        assert set(pool.map(fail, range(others + 1))) == {"SignerUnavailable"}
    assert 1 <= calls(proxy).count(LOGIN) < others  # some may have begun after the failure


def test_login_that_may_have_been_counted_is_not_sent_again(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, secret_id = server.make_approle("lost", secret_id_num_uses=1)
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: secret_id}

    def lost(request: Any, forward: Any) -> Answer:
        forward(request)
        raise Dropped

    for fault in (lost, refusal(500, "internal error"), refusal(502), refusal(504)):
        proxy.requests.clear()
        proxy.fault = fault
        with pytest.raises(errors.SignerUnavailable) as failure:
            open_signer("hashivault://d1", address=proxy.url, **options)
        assert failure.value.retryable
        assert calls(proxy) == [LOGIN]


@pytest.mark.parametrize(
    ("status", "text"),
    [(412, "x"), (429, "quota"), (503, "Vault is sealed"), (500, "local node not active but …")],
)
def test_login_that_was_not_dealt_with_is_sent_again(
    server: vault.Vault, proxy: FaultProxy, status: int, text: str
) -> None:
    times = iter(range(2))

    def passing(request: Any, forward: Any) -> Answer:
        if next(times, None) is not None:
            return refusal(status, text)(request, forward)
        return forward(request)  # type: ignore[no-any-return]

    proxy.fault = passing
    with _by_approle(server, proxy, "passing", secret_id_num_uses=1) as signer:
        signs(signer)
    assert calls(proxy).count(LOGIN) == 3


def test_denied_login_rests_and_is_tried_again(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a role is that Vault has locked, for somebody else's failures: the secret id may be right.
    role_id, secret_id = server.make_approle("locked")
    http = HttpClient(read_settings(proxy.url))
    tokens = Tokens(app_role(role_id, lambda: secret_id, "approle"))
    proxy.fault = refusal(403, "permission denied")
    for _ in range(5):
        with pytest.raises(errors.LoginError):
            tokens.current(http, time.monotonic() + 30)
    assert calls(proxy).count(LOGIN) == 1
    proxy.fault = None
    monkeypatch.setattr("d1_signer.backends.vault.logins._DENIED_REST", 0.0)
    assert tokens.current(http, time.monotonic() + 30) is not None


def test_login_from_another_address_rests_until_the_role_is_changed(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    role_id, _ = server.make_approle("elsewhere")
    path = "auth/approle/role/elsewhere"
    server.api("POST", path, secret_id_bound_cidrs=["10.9.9.9/32"])
    secret_id = server.api("POST", f"{path}/secret-id")["data"]["secret_id"]
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: secret_id}
    with pytest.raises(errors.LoginError, match="CIDR") as refused:
        open_signer("hashivault://d1", address=proxy.url, **options)
    assert refused.value.details["refused"] == "address"
    assert "address" in refused.value.hint
    server.api("POST", path, secret_id_bound_cidrs=["127.0.0.1/32"])
    with open_signer("hashivault://d1", address=proxy.url, **options) as signer:
        signs(signer)
    http = HttpClient(read_settings(proxy.url))
    tokens = Tokens(app_role(role_id, lambda: secret_id, "approle"))
    server.api("POST", path, secret_id_bound_cidrs=["10.9.9.9/32"])
    proxy.requests.clear()
    for _ in range(5):
        with pytest.raises(errors.LoginError):
            tokens.current(http, time.monotonic() + 30)
    assert calls(proxy) == [LOGIN]
    server.api("POST", path, secret_id_bound_cidrs=["127.0.0.1/32"])
    monkeypatch.setattr("d1_signer.backends.vault.logins._DENIED_REST", 0.0)
    assert tokens.current(http, time.monotonic() + 30) is not None


@pytest.mark.parametrize("text", ["invalid role ID", 'invalid role name "d1"', "no such entity"])
def test_refusal_that_does_not_judge_the_secret_id_does_not_ban_it(
    server: vault.Vault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    # As for a role that is made a little later, where Vault tells the two apart.
    role_id, secret_id = server.make_approle("later")
    http = HttpClient(read_settings(proxy.url))
    tokens = Tokens(app_role(role_id, lambda: secret_id, "approle"))
    proxy.fault = refusal(400, text)
    for _ in range(5):
        with pytest.raises(errors.LoginError):
            tokens.current(http, time.monotonic() + 30)
    assert calls(proxy).count(LOGIN) == 1
    proxy.fault = None
    monkeypatch.setattr("d1_signer.backends.vault.logins._DENIED_REST", 0.0)
    assert tokens.current(http, time.monotonic() + 30) is not None


def test_what_openbao_says_of_a_wrong_role_and_of_a_wrong_secret_id(server: vault.Vault) -> None:
    # The same, which is why a role that is made later needs another secret id.
    role_id, secret_id = server.make_approle("judged", secret_id_num_uses=1)
    gone, of_gone = server.make_approle("gone")
    server.api("DELETE", "auth/approle/role/gone")
    http = HttpClient(read_settings(server.url))

    def obtain(role: str, secret: str) -> Any:
        return app_role(role, lambda: secret, "approle").obtain(http, time.monotonic() + 30)

    obtain(role_id, secret_id)
    refused = [(gone, of_gone), ("no-such-role-id", "some-id"), (role_id, "wrong-id")]
    for role, secret in [*refused, (role_id, secret_id)]:
        with pytest.raises(errors.LoginError, match="invalid role or secret ID") as told:
            obtain(role, secret)
        assert told.value.details["refused"] == "secret"
        used_up = secret == secret_id
        assert ("secret_id_num_uses" in told.value.hint) is used_up
        with pytest.raises(errors.LoginError, match=r"refused .* before") as told:
            obtain(role, secret)
        assert ("secret_id_num_uses" in told.value.hint) is used_up


def test_a_typed_secret_id_is_asked_for_once(
    server: vault.Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    role_id, secret_id = server.make_approle("typed")
    asked: list[str] = []

    def prompt(what: str, of: str) -> str:
        asked.append(f"{what} for {of}")
        return secret_id

    monkeypatch.setattr("d1_signer.secret._prompt", prompt)
    with open_signer("hashivault://d1", role_id=role_id, secret_id_source="prompt") as signer:
        source = _tokens(signer)._source
        assert isinstance(source, Login)
        source.obtain(signer._backend._clients.get().http, time.monotonic() + 30)  # type: ignore[attr-defined]
    assert asked == [f"AppRole secret id for Vault at {urlsplit(server.url).netloc}"]


# -- wrapped secret ids ---------------------------------------------------------------------------


def test_wrapped_secret_id_is_unwrapped_once_and_kept(
    server: vault.Vault, proxy: FaultProxy, tmp_path: Path
) -> None:
    role_id, wrapping = server.make_wrapped("wrapped")
    file = _secret_file(tmp_path, wrapping)
    uri = f"hashivault://d1?role-id={role_id}&secret-id-source=file:{file}"
    with open_signer(uri, address=proxy.url) as signer:
        headers = next(r.headers for r in reversed(proxy.requests) if "X-Vault-Token" in r.headers)
        server.api("POST", "auth/token/revoke", token=headers["X-Vault-Token"])
        _tokens(signer)._source.interval = 0.0  # type: ignore[misc]
        signs(signer)
    assert calls(proxy).count("POST sys/wrapping/unwrap") == 1
    assert calls(proxy).count(LOGIN) == 2


def test_signers_of_a_process_share_what_one_of_them_unwrapped(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, wrapping = server.make_wrapped("shared")
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: wrapping}

    def signs_in_a_thread(_: int) -> None:
        with open_signer("hashivault://d1", address=proxy.url, **options) as signer:
            signs(signer)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(signs_in_a_thread, range(4)))
    assert calls(proxy).count("POST sys/wrapping/unwrap") == 1


def test_second_signer_on_a_wrapped_secret_id_for_one_use_is_told_so(server: vault.Vault) -> None:
    server.make_approle("single", secret_id_num_uses=1)
    role_id = server.api("GET", "auth/approle/role/single/role-id")["data"]["role_id"]
    wrapping = server.wrap("auth/approle/role/single/secret-id")
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: wrapping}
    with open_signer("hashivault://d1", **options) as signer:
        for _ in range(2):
            with pytest.raises(errors.LoginError) as refused:
                open_signer("hashivault://d1", **options)
            assert "stolen" not in refused.value.hint
            assert "each signer" in refused.value.hint
        signs(signer)


def test_what_was_unwrapped_is_not_offered_to_another_vault(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    # It has no way to know that a token is its own: the same source is asked for all of them.
    role_id, wrapping = server.make_wrapped("elsewhere")
    options: dict[str, Any] = {"role_id": role_id, "secret_id_source": lambda: wrapping}
    with open_signer("hashivault://d1", **options):
        secret_id = list(known.unwrapped.values())[-1].reveal()
    for other in ({"address": proxy.url}, {"namespace": "other"}, {"auth_mount": "other"}):
        with pytest.raises(errors.LoginError):
            open_signer("hashivault://d1", **{"address": proxy.url, **options, **other})
    assert calls(proxy)
    assert not [call for call in calls(proxy) if call.endswith("/login")]
    assert not [sent for sent in proxy.requests if secret_id.encode() in sent.body]
    with open_signer("hashivault://d1", **options) as signer:  # where it was unwrapped it serves on
        signs(signer)


def test_unwrapping_by_another_signer_is_waited_for_within_the_time_limit(
    server: vault.Vault,
) -> None:
    role_id, wrapping = server.make_wrapped("waits")
    other_id, other = server.make_wrapped("does-not-wait")
    endpoint = read_settings().endpoint
    digest = known.digest("wrapping", endpoint, "", "approle", wrapping)
    with known.alone(digest, time.monotonic() + 1):
        with pytest.raises(errors.SignerTimeout):
            open_signer(
                "hashivault://d1", role_id=role_id, secret_id_source=lambda: wrapping, timeout=0.2
            )
        with open_signer(
            "hashivault://d1", role_id=other_id, secret_id_source=lambda: other
        ) as signer:
            signs(signer)


def test_what_is_unwrapped_is_not_kept_without_bound() -> None:
    fresh = Known()
    for number in range(1000):
        fresh.keep(fresh.digest(str(number)), Secret("s"))
    assert len(fresh.unwrapped) < 100
    assert fresh.digest("999") in fresh.unwrapped
    assert fresh.digest("1") != Known().digest("1")


def test_wrapping_token_that_was_used_is_told_as_theft(server: vault.Vault) -> None:
    role_id, wrapping = server.make_wrapped("stolen")
    server.unwrap(wrapping)
    with pytest.raises(errors.LoginError) as refused:
        open_signer("hashivault://d1", role_id=role_id, secret_id_source=lambda: wrapping)
    assert "stolen" in refused.value.hint
    assert wrapping not in repr(refused.value.to_dict())


def test_what_somebody_else_wrapped_is_not_unwrapped(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, secret_id = server.make_approle("rewrapped")
    wrapping = server.wrap("sys/wrapping/wrap", secret_id=secret_id)
    with pytest.raises(errors.LoginError, match="not wrapped as an AppRole's") as refused:
        open_signer(
            "hashivault://d1", address=proxy.url, role_id=role_id, secret_id_source=lambda: wrapping
        )
    assert "stolen" in refused.value.hint
    assert "POST sys/wrapping/unwrap" not in calls(proxy)


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.stress
def test_threads_that_wait_for_one_login_keep_to_the_time_limit() -> None:
    http = HttpClient(read_settings("http://127.0.0.1:1"))
    tokens = Tokens(app_role("role", lambda: "secret-id-1", "approle"))
    with tokens._lock:
        started = time.monotonic()
        with pytest.raises(errors.SignerTimeout):
            tokens.current(http, started + 0.2)
        assert time.monotonic() - started < 2.0


def test_what_is_logged_of_a_renewal_holds_no_token(
    server: vault.Vault,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("d1_signer.backends.vault.held._RENEW_SHARE", 0.02)
    monkeypatch.setattr("d1_signer.backends.vault.tokens._TIME_TO_RENEW", 0.2)
    caplog.set_level(logging.DEBUG)

    def echo(request: Any, forward: Any) -> Answer:
        if "renew-self" in request.path:
            said = f"no renewal for {request.headers['X-Vault-Token']}"
            return refusal(503, said)(request, forward)
        return forward(request)  # type: ignore[no-any-return]

    with _by_approle(server, proxy, "logged", token_ttl="50s", token_max_ttl="1h") as signer:
        proxy.fault = echo
        _wait_for(lambda: "hashivault.token_not_renewed" in caplog.text)
        held = _tokens(signer)._held
        assert held is not None
        assert held.token is not None
        assert held.token.reveal() not in caplog.text


# -- forks ----------------------------------------------------------------------------------------

_FORKED = """
import os, sys, time
from d1_signer import open_signer
address, role_id, secret_id = sys.argv[1:]
signer = open_signer(
    "hashivault://d1", address=address, role_id=role_id, secret_id_source=lambda: secret_id
)
signer.sign(b"m")
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        signer.public_key.verify(signer.sign(b"m"), b"m")
        tokens = signer._backend._clients.get()._tokens
        ends, until = tokens._held.ends, time.monotonic() + 40
        while tokens._held.ends <= ends and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(0 if tokens._held.ends > ends else 3)
    children.append(child)
signer.sign(b"m")
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
signer.sign(b"m")
sys.exit(max(codes))
"""


def test_forked_children_go_on_with_the_token_of_a_single_use_secret_id(
    server: vault.Vault, proxy: FaultProxy
) -> None:
    role_id, secret_id = server.make_approle("forked", secret_id_num_uses=1, token_ttl="60s")
    setting = "import d1_signer.backends.vault.held as held; held._RENEW_SHARE = 0.02\n"
    ran = subprocess.run(
        [sys.executable, "-c", setting + _FORKED, proxy.url, role_id, secret_id],
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert ran.returncode == 0, ran.stderr
    assert calls(proxy).count(LOGIN) == 1
