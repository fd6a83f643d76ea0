"""A real Redis of our own: on a free port, a unix socket and, with a certificate made on the spot, TLS."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

PASSWORD = "s3cret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """Runs between `start` and `kill`, which may be called in turn; `folder` keeps its data.

    Args:
        folder: Short enough for a unix socket's path, 107 bytes.
        options: Of redis-server, as on its command line.
    """

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        if (binary := shutil.which("redis-server")) is None:
            pytest.skip("no redis-server on the PATH")
        self.folder = folder
        self.port, self.tls_port = free_port(), free_port()
        self.socket = folder / "redis.sock"
        self.certificate = folder / "certificate.pem"
        self._command = [binary, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder)]
        self._command += ["--unixsocket", str(self.socket), "--requirepass", PASSWORD, *options]
        if tls:
            self._command += self._tls_options()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def start(self) -> "RedisServer":
        import redis

        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.RedisError:
                    assert self._process.poll() is None, (self.folder / "log").read_text()
                    assert time.monotonic() < deadline, (self.folder / "log").read_text()
                    time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: no goodbye to clients, no last save."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _tls_options(self) -> list[str]:
        if (openssl := shutil.which("openssl")) is None:
            pytest.skip("no openssl on the PATH")
        key = self.folder / "key.pem"
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", self.certificate], check=True, capture_output=True)
        files = ["--tls-cert-file", self.certificate, "--tls-key-file", key, "--tls-ca-cert-file", self.certificate]
        return ["--tls-port", str(self.tls_port), *map(str, files), "--tls-auth-clients", "no"]
