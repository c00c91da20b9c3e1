# SPDX-License-Identifier: Apache-2.0
"""Debian's nginx, with its files in a folder of the test's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import accepts, free_port, running

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx:
    """What it is told to serve; each server has a port of its own.

    Attributes:
        folder: For its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: list[str] = []
        self._ports: list[int] = []

    def serve(self, settings: str, *, tls: tuple[Path, Path] | None, of_tls: bool = False) -> int:
        """Add a server with settings in nginx's language; returns its port.

        Args:
            settings: What stands in its ``server`` block.
            tls: Certificate and key; None: plain HTTP.
            of_tls: Whether it speaks TLS with a certificate that the settings name.
        """
        port = free_port()
        listen = f"listen 127.0.0.1:{port}{' ssl' if tls or of_tls else ''};"
        if tls:
            listen += f" ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};"
        self._servers.append(f"server {{ {listen}\n{settings}\n}}")
        self._ports.append(port)
        return port

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run it; afterwards it is gone."""
        paths = "\n".join(f"{name}_temp_path {self.folder}/{name};" for name in _TEMPORARY)
        configuration = self.folder / "nginx.conf"
        configuration.write_text(
            f"daemon off;\nmaster_process off;\npid {self.folder}/pid;\nerror_log stderr;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{paths}\n" + "\n".join(self._servers) + "\n}\n"
        )
        command = ["nginx", "-p", str(self.folder), "-e", "stderr", "-c", str(configuration)]

        def ready() -> bool:
            return all(accepts(port) for port in self._ports)

        # Debian has it where only root's PATH looks.
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        with running(command, env=env, log=self.folder / "nginx.log", ready=ready):
            yield
