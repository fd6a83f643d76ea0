"""A real Redis of our own: on a free port, a unix socket and, with a certificate made on the spot, TLS.
Three of them as a cluster, and a Sentinel beside one."""

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
        self._command += ["--unixsocket", str(self.socket), "--requirepass", PASSWORD, "--masterauth", PASSWORD]
        self._command += options
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


class RedisCluster:
    """Three primaries that share the slots, between `start` and `kill`."""

    def __init__(self, folder: Path) -> None:
        self.nodes, self._bus_ports = [], [free_port() for _ in range(3)]  # the default, port + 10 000, may be none
        for number, bus_port in enumerate(self._bus_ports):
            (folder / str(number)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--save", "")
            self.nodes.append(RedisServer(folder / str(number), *options))

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def start(self) -> "RedisCluster":
        import redis

        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(redis.Redis.from_url(node.start().url)) for node in self.nodes]
            for client, slots in zip(clients, ((0, 5460), (5461, 10922), (10923, 16383)), strict=True):
                client.execute_command("CLUSTER ADDSLOTSRANGE", *slots)
                client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port, self._bus_ports[0])
            wait_until(lambda: all(client.cluster("INFO")["cluster_state"] == "ok" for client in clients))
        return self

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Sentinel:
    """Watches one server under the name `service`; has a password of its own."""

    service = "calls"
    password = "s3ntinel"

    def __init__(self, folder: Path, server: RedisServer) -> None:
        if (binary := shutil.which("redis-server")) is None:
            pytest.skip("no redis-server on the PATH")
        self.port = free_port()
        watched = f"sentinel monitor {self.service} 127.0.0.1 {server.port} 1\n"
        watched += (
            f"sentinel auth-pass {self.service} {PASSWORD}\nsentinel down-after-milliseconds {self.service} 300\n"
        )
        own = f"port {self.port}\nbind 127.0.0.1\ndir {folder}\nrequirepass {self.password}\n"
        configuration = folder / "sentinel.conf"
        configuration.write_text(own + watched)
        self._command = [binary, str(configuration), "--sentinel"]
        self._log = folder / "sentinel.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def start(self) -> "Sentinel":
        import redis

        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

        def answers() -> bool:
            with redis.Redis(port=self.port, password=self.password) as client, contextlib.suppress(redis.RedisError):
                state = client.sentinel_masters()[self.service]
                return bool(state["is_master"] and not state["is_sdown"])
            return False

        wait_until(answers)
        return self

    def manager(self, **sentinel_options: Any) -> Any:
        """A client of the sentinel, for whom each failure is the last."""
        import redis.sentinel
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        once = {"retry": Retry(NoBackoff(), 0)}
        mine = {"password": self.password, "socket_timeout": 2.0, **once, **sentinel_options}
        return redis.sentinel.Sentinel([self.address], sentinel_kwargs=mine, password=PASSWORD, **once)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Proxy:
    """Between a client and a server on loopback; may swallow answers, as a cut connection does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.swallow = False
        self.swallow_once = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                redis = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._pass, args=(client, redis), daemon=True).start()
            threading.Thread(target=self._pass, args=(redis, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool = False) -> None:
        with source, sink, contextlib.suppress(OSError):
            while (data := source.recv(65536)) and not (answers and (self.swallow or self.swallow_once)):
                sink.sendall(data)
            self.swallow_once = self.swallow_once and not (answers and data)
            for end in (source, sink):
                end.shutdown(socket.SHUT_RDWR)  # a close alone waits for the other direction

    def close(self) -> None:
        self._listener.close()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def running(*servers: Any) -> Iterator[None]:
    """Starts them in turn, and kills those that it has started."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.kill)
        yield
