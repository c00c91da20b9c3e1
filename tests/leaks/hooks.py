# SPDX-License-Identifier: Apache-2.0
"""Where the watch is told of secrets, errors, log lines and files, for as long as Python runs."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.leaks.allowed import file_is_left_out
from tests.leaks.watch import TESTS, LeakWatch

_PACKAGE = f"{TESTS.parent}/d1_signer/"
_WRITING = os.O_WRONLY | os.O_RDWR
_DUNDERS = {"__init__", "__call__", "__enter__", "__exit__"}
# Faces beside the names of `import d1_signer`.
_OTHER_FACES = (
    ("d1_signer.transport.session", "_CallersSession"),
    ("d1_signer.cli", "main"),
    ("d1_signer.sandbox", "Sandbox"),
    ("d1_signer.es256", "raw_from_der"),
    ("d1_signer.es256", "der_from_raw"),
)

between = LeakWatch()  # what is made outside of a test: by fixtures that serve many
current = between


def begin() -> LeakWatch:
    """Have a new watch told of everything; it knows and looks at what came since the last one."""
    global current  # noqa: PLW0603 (audit hooks stay for ever, so they ask here)
    watch = LeakWatch()
    watch.secrets |= between.known_secrets()
    watch.errors, between.errors = between.errors, []
    watch.lines, between.lines = between.lines, []
    current = watch
    return watch


def ignore() -> None:
    """Until `end`, nothing is watched, and nothing is left to the test after."""
    global current  # noqa: PLW0603
    current = LeakWatch()


def end() -> None:
    """Go back to what belongs to no test."""
    global current  # noqa: PLW0603
    current = between


def watch_values() -> None:
    """Hook into what carries secrets, the errors and the logging.

    Before our modules are imported: they take names out of cryptography's.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for module, name in (
        (serialization, "load_pem_private_key"),
        (serialization, "load_der_private_key"),
        (ec, "generate_private_key"),
        (ec, "derive_private_key"),
    ):
        setattr(module, name, _noting_keys(getattr(module, name)))
    from d1_signer.errors import D1SignerError
    from d1_signer.sandbox.softhsm import SoftHsmToken
    from d1_signer.secret import Secret
    from d1_signer.token.response import Grant

    _before(Secret, "__init__", lambda _, value: current.note(value))
    _before(Grant, "__init__", lambda _, **members: current.note(members["value"]))
    _before(D1SignerError, "__init__", lambda error, *_, **__: current.note_error(error))
    _before(SoftHsmToken, "__init__", lambda _, **members: current.note(members["pin"]))
    _before(SoftHsmToken, "__init__", lambda _, **members: current.note(members["so_pin"]))
    make_fresh = D1SignerError.fresh

    def noting_fresh(self: D1SignerError) -> D1SignerError:
        # The copy is what the caller gets; the original ends here, and its traceback with it.
        twin = make_fresh(self)
        current.forget_error(self)
        current.note_error(twin)
        return twin

    D1SignerError.fresh = noting_fresh  # type: ignore[method-assign, assignment]
    make_record = logging.getLogRecordFactory()

    def noting_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        current.note_record(record)
        return record

    logging.setLogRecordFactory(noting_record)
    sys.addaudithook(_noting_files)


def _noting_keys(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def noting(*args: Any, **options: Any) -> Any:
        key = make(*args, **options)
        current.note_key(key)
        return key

    return noting


def _before(kind: type, name: str, look: Callable[..., object]) -> None:
    method = getattr(kind, name)

    @functools.wraps(method)
    def looking(*args: Any, **options: Any) -> Any:
        look(*args, **options)
        return method(*args, **options)

    setattr(kind, name, looking)


def _noting_files(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = args
        writes = flags & _WRITING if isinstance(flags, int) else "r" not in (mode or "r")
        if writes and isinstance(path, str | bytes | os.PathLike):
            writer = _writer()
            ours = writer.startswith(_PACKAGE) and not file_is_left_out(writer)
            current.note_written(_absolute(path), ours=ours)
    elif event == "os.remove":
        current.note_removed(_absolute(args[0]))
    elif event == "os.rename":
        current.note_renamed(_absolute(args[0]), _absolute(args[1]))


def _absolute(path: str | bytes | os.PathLike[Any]) -> str:
    # No link is followed: a look at the disk would be another event.
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100


def _writer() -> str:
    """The file of ours or of the tests that writes, through whatever library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith((_PACKAGE, str(TESTS))):
            return name
        frame = frame.f_back
    return ""


def watch_public_calls() -> None:
    """Hook into every public call, so that whatever it raises is looked at.

    Each name only once its module is there; to be called again when more were imported.
    """
    import d1_signer

    homes = [(f"d1_signer.{home}", name) for name, home in d1_signer._HOME_OF.items()]
    replaced: dict[int, Callable[..., Any]] = {}
    for home, name in (*homes, *_OTHER_FACES):
        module = sys.modules.get(home)
        face = getattr(module, name, None)
        if inspect.isclass(face):
            if not issubclass(face, BaseException) and not getattr(face, "_is_protocol", False):
                _watch_methods(face)
        elif inspect.isfunction(face) and not hasattr(face, "watched"):
            replaced[id(face)] = _noting_errors(face)
    modules = [sys.modules[key] for key in sys.modules if key.startswith(("d1_signer", "tests"))]
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _watch_methods(kind: type) -> None:
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name not in _DUNDERS:
            continue
        if isinstance(member, classmethod | staticmethod):
            if inspect.isfunction(member.__func__) and not hasattr(member.__func__, "watched"):
                setattr(kind, name, type(member)(_noting_errors(member.__func__)))
        elif inspect.isfunction(member) and not hasattr(member, "watched"):
            setattr(kind, name, _noting_errors(member))


def _noting_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return function
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def called(*args: Any, **options: Any) -> Any:
            try:
                return await function(*args, **options)
            except BaseException as error:
                current.note_error(error)
                raise
    else:

        @functools.wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except BaseException as error:
                current.note_error(error)
                raise

    called.watched = True  # type: ignore[attr-defined]
    return called
