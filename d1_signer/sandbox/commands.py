# SPDX-License-Identifier: Apache-2.0
"""A command that runs beside what was set up for it, and gets the signals that are meant for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""The signals that a command gets in our place; one that is ignored stays so for both."""

_NO_SUCH_COMMAND, _NOT_EXECUTABLE, _BY_SIGNAL = 127, 126, 128  # as shells have it
_STDOUT = 1


@dataclass(frozen=True, slots=True)
class HeldSignals:
    """Signals that interrupt nothing, see `signals_held`."""

    _numbers: int  # the descriptor that those of what came are read from

    def status(self) -> int | None:
        """The exit status for the first that came, as shells have it; None where none came."""
        came = select.select([self._numbers], [], [], 0)[0]
        return _BY_SIGNAL + self.wait() if came else None

    def wait(self) -> signal.Signals:
        """Wait for one of them."""
        return signal.Signals(os.read(self._numbers, 1)[0])

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], *, stdout: int = _STDOUT
    ) -> int:
        """Run a command to its end, and pass on the signals.

        Args:
            command: The program and its arguments.
            environment: All its variables.
            stdout: The descriptor that becomes its standard output.

        Returns:
            Its exit status; 128 and the number of the signal that ended it, or that came before it
            was started; 127 where there is no such program, 126 where it cannot be run.
        """
        if (ended := self.status()) is not None:
            return ended
        former = signal.signal(signal.SIGCHLD, _nothing)  # it wakes up who reads
        try:
            process = os.posix_spawnp(
                command[0],
                tuple(command),
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdout, _STDOUT)],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them for itself
            )
            return self._pass_on_to(process)
        except OSError as error:
            told = f"Error: {command[0]} cannot be run: {error.strerror}.\n"
            # It may be closed. What Python held back for it would change the status at the end.
            with contextlib.suppress(OSError, AttributeError):
                os.write(sys.stderr.fileno(), told.encode(errors="backslashreplace"))
            missing = isinstance(error, FileNotFoundError)
            return _NO_SUCH_COMMAND if missing else _NOT_EXECUTABLE
        finally:
            signal.signal(signal.SIGCHLD, former)

    def _pass_on_to(self, process: int) -> int:
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else _BY_SIGNAL - code
            for number in os.read(self._numbers, 64):
                if number != signal.SIGCHLD and not _is_from_terminal(number):
                    with contextlib.suppress(PermissionError):  # it became another user
                        os.kill(process, number)


@contextlib.contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[HeldSignals]:
    """Remember these signals, which end nothing meanwhile; from the main thread.

    By handlers, not by a mask: threads that a library has started take signals as well.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    former = {number: signal.signal(number, _nothing) for number in numbers}
    try:
        yield HeldSignals(reading)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        os.close(reading)


def unless_ignored(*numbers: signal.Signals) -> tuple[signal.Signals, ...]:
    """Those that this process does not ignore, as it does under ``nohup``."""
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _is_from_terminal(number: int) -> bool:
    """Whether the terminal has sent it: to all in its foreground, so to the command as well."""
    if number not in (signal.SIGINT, signal.SIGQUIT):
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)
