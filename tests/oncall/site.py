# SPDX-License-Identifier: Apache-2.0
"""What stands around the service: D1, an HSM on a wire, and a proxy, a Redis or a KMS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl

from d1_signer import Limits, PublicKey, generate_key
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken, make_softhsm_token
from tests.oncall.seen import Seen
from tests.pkcs11.softhsm import copy_token
from tests.pkcs11.wire import wire
from tests.servers.aws import ENVIRONMENT, SECRET_KEY, SESSION_TOKEN, Aws, aws_kms
from tests.servers.connect_proxy import ConnectProxy
from tests.servers.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
ISSUER = "nordbank-cards"
KID = "nordbank-2026"
_ETC = "etc/d1"
_CONFIG = f"{_ETC}/production.toml"
_PATIENCE = 60.0  # seconds for what happens within a few on a machine that is idle


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a service uses beside D1.

    Attributes:
        hosts: On how many it runs.
        proxy: Whether D1 is reached through one.
        store: Whether the hosts share their token.
        kms: Whether the key is in AWS KMS; else in an HSM.
    """

    hosts: int = 1
    proxy: bool = False
    store: bool = False
    kms: bool = False


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast things go, in seconds.

    Attributes:
        life: Of D1's tokens.
        calls: Between two calls of one caller.
        healthy: How many tokens each host gets before something happens.
        retry: Between two renewals at least.
        limits: Of a renewal.
    """

    life: float
    calls: float
    healthy: int
    retry: float
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A token with a key, only copied; and the key as D1 is given it."""

    token: SoftHsmToken
    jwk: Mapping[str, str]

    @classmethod
    def make(cls, folder: Path) -> Self:
        token = make_softhsm_token(folder, label="nordbank")
        before = os.environ.get("SOFTHSM2_CONF")
        os.environ["SOFTHSM2_CONF"] = str(token.configuration)
        try:
            jwk = generate_key(token.uri).public_key.jwk()
        finally:
            os.environ.pop("SOFTHSM2_CONF")
            if before is not None:
                os.environ["SOFTHSM2_CONF"] = before
        return cls(token=token, jwk=jwk)


class Site:
    """Everything of one exercise; a context manager.

    Attributes:
        d1: The sandbox.
        ahead: Seconds by which D1's clock is ahead of this machine's.
        token: The HSM's.
        hsm: The way to it.
        proxy: Before D1.
        redis: The hosts' store.
        aws: The KMS.
        key_id: Of the key there.
        settings: Of each host.
        out: Where the log, the metrics and the status are written.
    """

    def __init__(self, folder: Path, prepared: Prepared, needs: Needs, pace: Pace) -> None:
        self._folder, self.needs, self.pace = folder, needs, pace
        self._stack = ExitStack()
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._processes: dict[int, str] = {}
        self.hosts = [f"issuer-{number}" for number in range(1, needs.hosts + 1)]
        self.ahead = 0.0
        self.key_id = ""
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(("D1_", "AWS_"))}
        self.env["PYTHONPATH"] = str(ROOT)
        self.settings: dict[str, dict[str, Any]] = {}
        self._prepared = prepared
        self.out = folder / "out"
        self.out.mkdir()

    def __enter__(self) -> Self:
        with self._stack:
            self._begin()
            self._stack = self._stack.pop_all()
        return self

    def _begin(self) -> None:
        needs, stack = self.needs, self._stack
        clock = lambda: time.time() + self.ahead  # noqa: E731
        self.d1 = stack.enter_context(Sandbox(ISSUER, token_lifetime=self.pace.life, clock=clock))
        self.d1.register_key(KID, self._prepared.jwk)
        key = self._begin_kms() if needs.kms else self._begin_hsm()
        if needs.proxy:
            proxy = ConnectProxy(credentials="d1-egress:first-password-of-the-proxy")
            self.proxy = stack.enter_context(proxy.running())
        if needs.store:
            place = self._folder / "redis"
            place.mkdir()
            self.redis = stack.enter_context(RedisServer(place))
        store_key = os.urandom(32).hex()
        for host in self.hosts:
            self.settings[host] = self._configure(host, key, store_key)
            self.start(host)

    def _begin_hsm(self) -> str:
        self.token = copy_token(self._prepared.token, self._folder / "token")
        self.hsm = self._stack.enter_context(wire(self.token, self._folder))
        self.env |= self.hsm.env
        return f"pkcs11:token={self.token.label};object=d1?module-path={self.hsm.client}"

    def _begin_kms(self) -> str:
        self.aws: Aws = self._stack.enter_context(aws_kms(self._folder))
        self.key_id = self.aws.make_key()
        self.env |= ENVIRONMENT
        uri = f"awskms:{self.key_id}?region=eu-central-1&endpoint={self.aws.url}"
        client = self.aws.client()
        key = PublicKey.from_der(client.get_public_key(KeyId=self.key_id)["PublicKey"])
        client.close()
        self.d1.register_key(KID, key.jwk())
        return uri

    def etc(self, host: str) -> Path:
        """Where a host has its settings; the same for each as it sees them."""
        return self._folder / host / _ETC

    def _configure(self, host: str, key: str, store_key: str) -> dict[str, Any]:
        etc = self.etc(host)
        etc.mkdir(parents=True)
        for source, name in (
            (self.d1.client_certificate, "client.pem"),
            (self.d1.client_key, "client.key"),
            (self.d1.ca_file, "ca.pem"),
        ):
            shutil.copy2(source, etc / name)
        settings = {
            "environment": self.d1.base_url,
            "issuer_id": ISSUER,
            "key": f"{key}#{KID}",
            "client_cert": f"{_ETC}/client.pem",
            "client_key": f"{_ETC}/client.key",
            "ca_file": f"{_ETC}/ca.pem",
            **{f"limits.{name}": value for name, value in asdict(self.pace.limits).items()},
        }
        if not self.needs.kms:
            shutil.copy2(self.token.pin_file, etc / "pin")
            settings["key"] = f"{key}&pin-source=file:{_ETC}/pin#{KID}"
        if self.needs.proxy:
            self.write_secret(host, "proxy-credentials", self.proxy.credentials or "")
            settings["proxy"] = self.proxy.url
            settings["proxy_credentials_source"] = f"file:{_ETC}/proxy-credentials"
        if self.needs.store:
            self.write_secret(host, "store-key", store_key)
            settings["store.url"] = f"redis://127.0.0.1:{self.redis.port}/0"
            settings["store.key_source"] = f"file:{_ETC}/store-key"
        self._write(host, settings)
        return settings

    def write_secret(self, host: str, name: str, value: str) -> None:
        """Write a file of a host for its owner alone."""
        file = self.etc(host) / name
        file.touch(0o600)
        file.write_text(value)

    def change(self, host: str, **settings: Any) -> None:
        """Write a host's settings with others in them."""
        self.settings[host] |= settings
        self._write(host, self.settings[host])

    def _write(self, host: str, settings: dict[str, Any]) -> None:
        fresh = self.etc(host) / ".production.toml"
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        fresh.write_text("".join(lines))
        fresh.replace(self._folder / host / _CONFIG)

    def start(self, host: str) -> None:
        """Start the service of a host; one that runs is ended."""
        self.stop(host)
        arguments = [_CONFIG, self.out, host, self.pace.calls, self.pace.retry]
        service = self._services[host] = subprocess.Popen(
            [sys.executable, "-m", "tests.oncall.service", *map(str, arguments)],
            cwd=self._folder / host,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes[service.pid] = host

    def stop(self, host: str) -> None:
        service = self._services.pop(host, None)
        if service is not None:
            service.kill()
            service.wait()

    def until(self, missing: Callable[[Seen], Collection[str]]) -> Seen:
        """Wait until nothing is missing of what the service is to show."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(FileNotFoundError):  # the service is starting
                seen = Seen.read(self.out)
                if not missing(seen):
                    return seen
            if time.monotonic() >= deadline:
                seen = Seen.read(self.out)
                raise AssertionError(f"it does not show {missing(seen)}:\n{seen}")
            time.sleep(0.02)

    def healthy(self) -> Seen:
        """Wait until each host has got its tokens."""
        number = self.pace.healthy
        return self.until(
            lambda seen: [host for host in self.hosts if seen.count(host, "token.renewed") < number]
        )

    def fleet_status(self, host: str) -> str:
        """What ``d1-signer status`` tells on a host."""
        command = ["status", "--config", _CONFIG]
        told = subprocess.run(
            [sys.executable, "-m", "d1_signer", *command],
            cwd=self._folder / host,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return f"{host}$ d1-signer {' '.join(command)}\n{told.stdout}"

    def secrets(self) -> set[str]:
        """All that must stand in none of what is shown."""
        files = ("pin", "store-key", "proxy-credentials")
        paths = [self.etc(host) / name for host in self.hosts for name in files]
        found = {path.read_text().strip() for path in paths if path.exists()}
        found |= {text.rpartition(":")[2] for text in found}
        found |= {SECRET_KEY, SESSION_TOKEN}
        for exchange in self.d1.exchanges:
            found |= {value for _, value in parse_qsl(exchange.request_body.decode())}
            if exchange.status == HTTPStatus.OK and b"access_token" in exchange.response_body:
                found.add(json.loads(exchange.response_body)["access_token"])
        return found

    def as_in_production(self, text: str) -> str:
        """A text with the names that production has in the place of those of this machine."""
        names = {
            _ETC: f"/{_ETC}",
            "d1-signer sandbox client": ISSUER,
            "d1-signer sandbox authority": "Thales D1 Issuer CA",
            self.d1.base_url.split("/")[2]: "api.d1.thalescloud.io",
        }
        if self.needs.proxy:
            names[f"127.0.0.1:{self.proxy.port}"] = "proxy.nordbank.example:3128"
        if self.needs.store:
            names[f"127.0.0.1:{self.redis.port}"] = "redis.nordbank.example:6379"
        if self.needs.kms:
            names[self.aws.url] = "https://kms.eu-central-1.amazonaws.com"
        here = socket.gethostname()
        names |= {f"{here}:{pid}": f"{host}:{pid}" for pid, host in self._processes.items()}
        for name, shown in names.items():
            text = text.replace(name, shown)
        return text

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            self.stop(host)
        self._stack.close()
