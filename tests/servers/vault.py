# SPDX-License-Identifier: Apache-2.0
"""The real OpenBao server, in its development mode, with a plain and a TLS listener."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from tests.leaks.known import known
from tests.servers.certificates import Authority, self_signed
from tests.servers.fault_proxy import (
    Answer,
    Fault,
    FaultProxy,
    Forward,
    Request,
    join,
    listening,
)
from tests.servers.process import accepts, free_port, running

BAO = str(Path(sys.executable).parent / "bao")
ROOT_TOKEN = known("root-token-of-the-tests")

POLICY = """
path "transit/keys/*" { capabilities = ["read"] }
path "transit/sign/+/sha2-256" { capabilities = ["update"] }
"""


@dataclass(frozen=True)
class Vault:
    """A running server."""

    port: int
    tls_port: int
    ca_file: Path
    mutual_port: int
    authority: Authority

    @property
    def mutual_url(self) -> str:
        """Where a certificate of `authority` has to be shown."""
        return f"https://localhost:{self.mutual_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        return f"https://localhost:{self.tls_port}"

    def api(self, method: str, path: str, **body: object) -> Any:
        """What an operator does."""
        headers = {"X-Vault-Token": ROOT_TOKEN}
        url = f"{self.url}/v1/{path}"
        answer = requests.request(method, url, json=body or None, headers=headers, timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else {}

    def make_key(self, name: str, **settings: object) -> str:
        self.api("POST", f"transit/keys/{name}", **{"type": "ecdsa-p256", **settings})
        return name

    def make_external_key(self, name: str) -> str:
        """A key in another engine, which stands for an HSM, and one in Transit that refers to it.

        Returns the public key in PEM.
        """
        if "hsm/" not in self.api("GET", "sys/mounts")["data"]:
            self.api("POST", "sys/mounts/hsm", type="transit")
            self.api(
                "POST",
                "sys/external-keys/configs/hsm",
                plugin="transit",
                address=self.url,
                token=ROOT_TOKEN,
                mount_path="hsm",
            )
        self.api("POST", f"hsm/keys/{name}", type="ecdsa-p256")
        configured = f"sys/external-keys/configs/hsm/keys/{name}"
        self.api("POST", configured, name=name, version=1)
        self.api("POST", f"{configured}/grants/transit")
        self.make_key(name, type="external-key", external_key_ref=f"hsm:{name}")
        pem: str = self.api("GET", f"hsm/keys/{name}")["data"]["keys"]["1"]["public_key"]
        return pem

    def make_token(self, policy: str = "signer", **settings: object) -> str:
        told = self.api("POST", "auth/token/create", policies=[policy], **settings)
        token: str = told["auth"]["client_token"]
        return token

    def make_approle(self, name: str, **settings: object) -> tuple[str, str]:
        """Returns the role id and a secret id."""
        self.api("POST", f"auth/approle/role/{name}", token_policies=["signer"], **settings)
        role_id = self.api("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
        secret = self.api("POST", f"auth/approle/role/{name}/secret-id")["data"]["secret_id"]
        return role_id, secret

    def wrap(self, path: str, **body: object) -> str:
        """A token that wraps what a path answers."""
        headers = {"X-Vault-Token": ROOT_TOKEN, "X-Vault-Wrap-TTL": "300s"}
        answer = requests.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=30)
        answer.raise_for_status()
        token: str = answer.json()["wrap_info"]["token"]
        return token

    def unwrap(self, token: str) -> Any:
        url, headers = f"{self.url}/v1/sys/wrapping/unwrap", {"X-Vault-Token": token}
        return requests.post(url, headers=headers, timeout=30).json()

    def make_wrapped(self, name: str) -> tuple[str, str]:
        """Returns the role id of an AppRole and a token that wraps a secret id."""
        role_id, _ = self.make_approle(name)
        return role_id, self.wrap(f"auth/approle/role/{name}/secret-id")

    @contextmanager
    def proxy(self) -> Iterator[FaultProxy]:
        with FaultProxy(("127.0.0.1", self.port)) as proxy:
            yield proxy


@contextmanager
def vault(directory: Path, *, audit_file: Path | None = None) -> Iterator[Vault]:
    certificate, key = self_signed(directory)
    port, tls_port, mutual_port = free_port(), free_port(), free_port()
    authority = Authority(directory)
    config = directory / "tls.json"
    files = {"tls_cert_file": str(certificate), "tls_key_file": str(key)}
    mutual = {
        "tls_require_and_verify_client_cert": True,
        "tls_client_ca_file": str(authority.ca_file),
    }
    listeners: list[dict[str, object]] = [
        {"address": f"127.0.0.1:{tls_port}", **files},
        {"address": f"127.0.0.1:{mutual_port}", **files, **mutual},
    ]
    settings: dict[str, object] = {"listener": [{"tcp": listener} for listener in listeners]}
    if audit_file is not None:
        settings["unsafe_allow_api_audit_creation"] = True
    config.write_text(json.dumps(settings))
    command = [
        BAO,
        "server",
        "-dev",
        "-dev-no-store-token",
        f"-dev-root-token-id={ROOT_TOKEN}",
        f"-dev-listen-address=127.0.0.1:{port}",
        f"-config={config}",
    ]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    server = Vault(port, tls_port, certificate, mutual_port, authority)

    def ready() -> bool:
        if not accepts(port):
            return False
        answer = requests.get(f"{server.url}/v1/sys/health", timeout=5)
        return answer.status_code == 200

    with running(command, env=environment, log=directory / "bao.log", ready=ready):
        if audit_file is not None:
            options = {"file_path": str(audit_file)}
            server.api("POST", "sys/audit/file", type="file", options=options)
        server.api("POST", "sys/mounts/transit", type="transit")
        server.api("POST", "sys/auth/approle", type="approle")
        server.api("POST", "sys/policy/signer", policy=POLICY)
        yield server


@contextmanager
def agent(server: Vault, directory: Path) -> Iterator[tuple[str, Path]]:
    """A proxy of OpenBao that logs in by itself; gives its URL and its Unix socket."""
    role_id, secret_id = server.make_approle("agent")
    role_file, secret_file = directory / "role-id", directory / "secret-id"
    role_file.write_text(role_id)
    secret_file.write_text(secret_id)
    port, unix_socket = free_port(), directory / "agent.sock"
    config = {
        "vault": {"address": server.url},
        "auto_auth": {
            "method": [
                {
                    "type": "approle",
                    "config": {
                        "role_id_file_path": str(role_file),
                        "secret_id_file_path": str(secret_file),
                        "remove_secret_id_file_after_reading": False,
                    },
                }
            ]
        },
        "api_proxy": {"use_auto_auth_token": True},
        "listener": [
            {"tcp": {"address": f"127.0.0.1:{port}", "tls_disable": True}},
            {"unix": {"address": str(unix_socket), "tls_disable": True}},
        ],
    }
    file = directory / "agent.json"
    file.write_text(json.dumps(config))
    command = [BAO, "proxy", f"-config={file}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        if not accepts(port) or not unix_socket.exists():
            return False
        # It has a token once it passes on what needs one.
        return requests.get(f"{url}/v1/auth/token/lookup-self", timeout=5).status_code == 200

    with running(command, env=environment, log=directory / "agent.log", ready=ready):
        yield url, unix_socket


@dataclass
class Cluster:
    """Three nodes over Raft, behind a port that takes connections to those that are alive."""

    url: str
    token: str
    nodes: dict[str, subprocess.Popen[bytes]]

    def kill_leader(self) -> str:
        url, node = next((url, node) for url, node in self.nodes.items() if _leads(url))
        node.kill()
        node.wait()
        return url


def _leads(url: str) -> bool:
    try:
        return requests.get(f"{url}/v1/sys/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


@contextmanager
def _node(directory: Path, number: int, leader: str) -> Iterator[tuple[str, Any]]:
    home = directory / f"node-{number}"
    (home / "raft").mkdir(parents=True)
    port, cluster_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    raft: dict[str, object] = {
        "path": str(home / "raft"),
        "node_id": f"node-{number}",
        "performance_multiplier": 1,
    }
    if leader:
        raft["retry_join"] = [{"leader_api_addr": leader}]
    config = {
        "storage": {"raft": raft},
        "listener": [{"tcp": {"address": f"127.0.0.1:{port}", "tls_disable": True}}],
        # Else a standby signs by itself, and nobody misses the leader.
        "disable_standby_reads": True,
        "api_addr": url,
        "cluster_addr": f"https://127.0.0.1:{cluster_port}",
    }
    config["listener"][0]["tcp"]["cluster_address"] = f"127.0.0.1:{cluster_port}"  # type: ignore[index]
    file = home / "config.json"
    file.write_text(json.dumps(config))
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    command = [BAO, "server", f"-config={file}"]
    with running(
        command, env=environment, log=home / "bao.log", ready=lambda: accepts(port)
    ) as process:
        yield url, process


def _until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(what)
        time.sleep(0.05)


def _unsealed(url: str, share: str) -> bool:
    answer = requests.post(f"{url}/v1/sys/unseal", json={"key": share}, timeout=30)
    return answer.ok and answer.json()["sealed"] is False


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Three nodes that hold a key ``d1``."""
    with ExitStack() as stack:
        nodes: dict[str, subprocess.Popen[bytes]] = {}
        first, process = stack.enter_context(_node(directory, 0, ""))
        nodes[first] = process
        shares = {"secret_shares": 1, "secret_threshold": 1}
        made = requests.post(f"{first}/v1/sys/init", json=shares, timeout=60).json()
        share, token = made["keys"][0], made["root_token"]
        _until(lambda: _unsealed(first, share) and _leads(first), "the first node does not lead")
        headers = {"X-Vault-Token": token}
        for number in (1, 2):
            url, process = stack.enter_context(_node(directory, number, first))
            nodes[url] = process
            _until(lambda url=url: _unsealed(url, share), "a node does not join")  # type: ignore[misc]
        soon = {"server_stabilization_time": "1s"}
        bodies: list[tuple[str, dict[str, str]]] = [
            ("sys/storage/raft/autopilot/configuration", soon),
            ("sys/mounts/transit", {"type": "transit"}),
            ("transit/keys/d1", {"type": "ecdsa-p256"}),
        ]
        for path, body in bodies:
            requests.post(
                f"{first}/v1/{path}", json=body, headers=headers, timeout=30
            ).raise_for_status()

        def all_vote() -> bool:
            path = "sys/storage/raft/configuration"
            told = requests.get(f"{first}/v1/{path}", headers=headers, timeout=30).json()
            servers = told["data"]["config"]["servers"]
            return len(servers) == len(nodes) and all(server["voter"] for server in servers)

        _until(all_vote, "the nodes do not vote")
        turns = itertools.cycle(int(url.rpartition(":")[2]) for url in nodes)
        port = stack.enter_context(listening(lambda connection: _to_a_node(connection, turns)))
        yield Cluster(f"http://127.0.0.1:{port}", token, nodes)


def _to_a_node(connection: socket.socket, turns: Iterator[int]) -> None:
    for _ in range(3):
        try:
            upstream = socket.create_connection(("127.0.0.1", next(turns)), timeout=2)
        except OSError:
            continue
        upstream.settimeout(None)
        with upstream:
            join(connection, upstream)
        return


def calls(proxy: FaultProxy) -> list[str]:
    """What was asked for, in order: method and path."""
    return [f"{request.method} {request.path.removeprefix('/v1/')}" for request in proxy.requests]


def on_sign(fault: Fault) -> Fault:
    """Let ``fault`` see the requests to sign only."""

    def seen(request: Request, forward: Forward) -> Answer:
        return fault(request, forward) if "/sign/" in request.path else forward(request)

    return seen


def refusal(status: int, *errors: str, **headers: str) -> Fault:
    body = json.dumps({"errors": list(errors)}).encode()
    told = {"Content-Type": "application/json", **headers}
    return lambda _request, _forward: Answer(status, told, body)


def signature(change: Any) -> Fault:
    """The signature's text is altered on its way back."""

    def alter(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        told = json.loads(answer.body)
        told["data"]["signature"] = change(told["data"]["signature"])
        return replace(answer, body=json.dumps(told).encode())

    return alter


def asking(path: str | None = None, **other: object) -> Fault:
    """The request is altered on its way."""

    def alter(request: Request, forward: Forward) -> Answer:
        body = json.dumps({**json.loads(request.body), **other}).encode()
        return forward(replace(request, body=body, path=path or request.path))

    return alter
