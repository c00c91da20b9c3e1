# SPDX-License-Identifier: Apache-2.0
"""Unit, container and manifest do what they say: their own commands, run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml  # type: ignore[import-untyped]

from d1_signer import generate_key
from d1_signer.sandbox import Sandbox
from d1_signer.testing import SoftHsmToken
from tests.docs.reading import ROOT
from tests.pkcs11.wire import module
from tests.servers.process import accepts, free_port, running

EXAMPLES = ROOT / "docs" / "examples"
BIN = Path(sys.executable).parent
UNIT = EXAMPLES / "issuer.service"
CONTAINERFILE = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
MANIFEST = (EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (document for document in DOCUMENTS if document["kind"] == kind)
    return found


def unit() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a short path: the path of a socket has 108 bytes at most."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def d1() -> Iterator[Sandbox]:
    with Sandbox("my-issuer") as sandbox:
        yield sandbox


def environment_of(d1: Sandbox, key: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("D1_")}
    return kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{EXAMPLES}",
        "D1_SIGNER_KEY": key,
        "D1_ISSUER_ID": "my-issuer",
        "D1_ENVIRONMENT": d1.base_url,
        "D1_CLIENT_CERT": str(d1.client_certificate),
        "D1_CLIENT_KEY": str(d1.client_key),
        "D1_CA_FILE": str(d1.ca_file),
    }


def started_as_the_unit_says(port: int) -> list[str]:
    program, *arguments = shlex.split(unit()["Service"]["ExecStart"])
    assert "127.0.0.1:8080" in arguments
    local = [word.replace(":8080", f":{port}") for word in arguments]
    return [str(BIN / Path(program).name), *local]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    service = unit()["Service"]
    assert set(unit().sections()) == {"Unit", "Service", "Install"}
    assert service["Restart"] == "on-failure"
    # systemd-analyze looks whether the program is there.
    copy = tmp_path / "issuer.service"
    text = UNIT.read_text(encoding="utf-8")
    copy.write_text(text.replace("/opt/issuer/venv/bin/gunicorn", str(BIN / "gunicorn")))
    # Not everywhere; what matters of it is run below.
    if shutil.which("systemd-analyze"):
        told = subprocess.run(
            ["systemd-analyze", "verify", str(copy)],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_the_unit_tells_systemd_that_it_is_ready(d1: Sandbox, folder: Path) -> None:
    key = generate_key((folder / "key.pem").as_uri())
    d1.register_key("bank-2026", key.public_key.jwk())
    assert unit()["Service"]["Type"] == "notify"
    port, log = free_port(), folder / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(folder / "notify"))
        systemd.settimeout(50)
        environment = environment_of(d1, f"{key.uri}#bank-2026")
        environment["NOTIFY_SOCKET"] = str(folder / "notify")
        command = started_as_the_unit_says(port)
        with running(command, env=environment, log=log, ready=lambda: accepts(port)):
            assert b"READY=1" in systemd.recv(1024)
            url = f"http://127.0.0.1:{port}"
            assert requests.get(f"{url}/", timeout=20).status_code == 200
            health = requests.get(f"{url}/healthz", timeout=20)
            assert (health.status_code, health.json()["healthy"]) == (200, True)


def test_a_refused_pin_ends_with_the_status_that_systemd_does_not_restart(
    d1: Sandbox, softhsm_token: SoftHsmToken, folder: Path
) -> None:
    generate_key(softhsm_token.uri)
    wrong = folder / "pin"
    wrong.touch(mode=0o600)
    wrong.write_text("0000")
    uri = re.sub(r"pin-source=[^&#]*", f"pin-source=file:{wrong}", softhsm_token.uri)
    assert uri != softhsm_token.uri
    environment = environment_of(d1, f"{uri}#bank-2026")
    environment["SOFTHSM2_CONF"] = str(softhsm_token.configuration)
    ended = subprocess.run(
        started_as_the_unit_says(free_port()),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert "refused the PIN" in ended.stderr
    assert "0000" not in ended.stderr
    # --preload: no worker was started, which would have tried it again.
    assert "Booting worker" not in ended.stderr
    assert str(ended.returncode) == unit()["Service"]["RestartPreventExitStatus"]


def stages() -> dict[str, list[list[str]]]:
    """The instructions of each stage, as words."""
    lines = re.sub(r"\\\n", " ", CONTAINERFILE).splitlines()
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            words = shlex.split(line) if not line.startswith("CMD") else ["CMD", line[4:]]
            if words[0] == "FROM":
                assert words[2] == "AS"
                found[words[3]] = []
            list(found.values())[-1].append(words)
    return found


def test_what_the_container_is_made_of_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    checked = 0
    for words in (words for stage in stages().values() for words in stage):
        if words[0] == "COPY":
            assert all((ROOT / source).exists() for source in words[1:-1])
            checked += 1
        for named in re.findall(r"d1-signer\[([\w,]+)\]", " ".join(words)):
            assert set(named.split(",")) <= set(extras)
            checked += 1
    assert checked == 2
    assert set(stages()) == {"service", "softhsm"}
    assert stages()["softhsm"][0][1] == "service"


def test_no_stage_ends_as_root() -> None:
    for instructions in stages().values():
        *_, (_, user) = [words for words in instructions if words[0] == "USER"]
        assert user == "10001:10001"
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["fsGroup"] == 10001


def containers() -> dict[str, dict[str, Any]]:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    return {each["name"]: each for each in [*pod["initContainers"], *pod["containers"]]}


def test_what_the_manifest_names_is_defined() -> None:
    deployment = of_kind("Deployment")["spec"]
    pod = deployment["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in containers().values():
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        target = container["image"].removeprefix("issuer-").partition(":")[0]
        assert target.replace("issuer", "service") in stages()
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == of_kind("Service")["spec"]["selector"]
    (port,) = containers()["service"]["ports"]
    assert containers()["service"]["readinessProbe"]["httpGet"]["port"] == port["name"]
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    exposed = [words[1] for words in stages()["service"] if words[0] == "EXPOSE"]
    assert exposed == [str(port["containerPort"])]
    assert "livenessProbe" not in containers()["service"]


def test_variables_of_the_manifest_are_those_of_the_examples() -> None:
    read = re.findall(r'settings(?:\.get\(|\[)"(\w+)"', (EXAMPLES / "fleet_fetcher.py").read_text())
    given = of_kind("ConfigMap")["data"]
    assert set(given) - {"P11_KIT_SERVER_ADDRESS"} <= set(read)
    source = containers()["service"]["envFrom"][0]["configMapRef"]["name"]
    assert source == of_kind("ConfigMap")["metadata"]["name"]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: without_nulls(v) for k, v in value.items() if k != "creationTimestamp"}
        return {k: v for k, v in kept.items() if v not in (None, {}) or k in {"emptyDir", "tmp"}}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ["ConfigMap", "Deployment", "Service"])
def test_kubectl_reads_all_that_the_manifest_says(kind: str, tmp_path: Path) -> None:
    document = of_kind(kind)
    assert set(document) <= {"apiVersion", "kind", "metadata", "spec", "data"}
    if not shutil.which("kubectl"):
        return
    # kubectl knows the types of these kinds, and drops what they do not have.
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(document))
    read = subprocess.run(
        ["kubectl", "annotate", "--local", "-f", "one.yaml", "-o", "json", "read=1"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    told = json.loads(read.stdout)
    assert told["metadata"].pop("annotations") == {"read": "1"}
    told.pop("status", None)
    assert without_nulls(told) == without_nulls(document)


def local(text: str, places: dict[str, str]) -> str:
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def test_the_pod_works_as_its_commands_say(d1: Sandbox, folder: Path) -> None:
    """Each container's own command, with the volumes in a folder of this machine."""
    for name in ("token", "hsm"):
        (folder / name).mkdir()
    port = free_port()
    data = of_kind("ConfigMap")["data"]
    (pin,) = (m for m in containers()["service"]["volumeMounts"] if "subPath" in m)
    places = {
        "/token": str(folder / "token"),
        "/run/hsm": str(folder / "hsm"),
        pin["mountPath"]: str(folder / pin["name"] / pin["subPath"]),
        "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so": module("p11-kit-client.so"),
        ":8080": f":{port}",
    }
    settings = {name: local(value, places) for name, value in data.items()}
    environment = environment_of(d1, settings["D1_SIGNER_KEY"])
    environment["P11_KIT_SERVER_ADDRESS"] = settings["P11_KIT_SERVER_ADDRESS"]

    def command(name: str) -> list[str]:
        return [local(word, places) for word in containers()[name]["command"]]

    made = subprocess.run(
        command("token"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert made.returncode == 0, made.stderr
    jwk = json.loads(re.findall(r"^\{.*?^\}|^\{.*\}$", made.stdout, re.DOTALL | re.MULTILINE)[0])
    d1.register_key(jwk["kid"], {name: jwk[name] for name in ("kty", "crv", "x", "y")})
    (variable,) = containers()["hsm"]["env"]
    hsm = {**environment, variable["name"]: local(variable["value"], places)}
    probe = [local(word, places) for word in containers()["hsm"]["startupProbe"]["exec"]["command"]]

    def up() -> bool:
        return subprocess.run(probe, check=False, timeout=20).returncode == 0

    (served,) = [words[1] for words in stages()["service"] if words[0] == "CMD"]
    serving = [
        # Here on loopback only.
        re.sub(r"^[\d.]+:", "127.0.0.1:", local(word, places))
        for word in json.loads(served)
    ]
    serving[0] = str(BIN / serving[0])
    with ExitStack() as stack:
        stack.enter_context(running(command("hsm"), env=hsm, log=folder / "hsm.log", ready=up))
        stack.enter_context(
            running(serving, env=environment, log=folder / "log", ready=lambda: accepts(port))
        )
        probe_path = containers()["service"]["readinessProbe"]["httpGet"]["path"]
        url = f"http://127.0.0.1:{port}"
        assert requests.get(url, timeout=20).status_code == 200, (folder / "log").read_text()
        assert requests.get(url + probe_path, timeout=20).status_code == 200
