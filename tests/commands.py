"""The `mal-adapter` command as a shell runs it, in this process: importing torch anew for each would take seconds."""

import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from mal_adapter import cli


@dataclass
class Done:
    """What a shell sees of a command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


def mal_adapter(*arguments: object) -> Done:
    """Runs a command, its output going into pipes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        exit_code = _exit_code(arguments)
    return Done(exit_code, stdout.getvalue(), stderr.getvalue())


def on_a_terminal(*arguments: object, columns: int = 80, stdout_too: bool = True) -> Done:
    """Runs a command whose stderr, and stdout unless told otherwise, are a pseudo-terminal. The terminal shows both as
    one text, in `stderr`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    shown: list[bytes] = []
    stdout: Any = io.StringIO()

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                shown.append(part)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with (
        os.fdopen(theirs, "w", encoding="utf-8") as terminal,
        redirect_stdout(terminal if stdout_too else stdout),
        redirect_stderr(terminal),
    ):
        exit_code = _exit_code(arguments)
    reader.join()
    os.close(ours)
    return Done(exit_code, stdout.getvalue(), b"".join(shown).decode())


def _exit_code(arguments: tuple[object, ...]) -> int:
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.stdout.flush()


def interrupted(*arguments: object, at: bytes) -> Done:
    """Runs a command in a process of its own on a pseudo-terminal, and presses Ctrl-C once it has shown `at`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    command = [sys.executable, "-m", "mal_adapter.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown, sent = b"", False
        with suppress(OSError):  # the terminal of a process that has ended
            while part := os.read(ours, 65536):
                shown += part
                if not sent and at in shown:
                    process.send_signal(signal.SIGINT)
                    sent = True
        assert process.stdout is not None
        stdout = process.stdout.read()
    os.close(ours)
    return Done(process.returncode, stdout, shown.decode())
