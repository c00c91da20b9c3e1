# SPDX-License-Identifier: Apache-2.0
"""One initialisation for us and for other code of the process that uses python-pkcs11.

`pkcs11.lib` keeps an object of each module, by its path, and calls ``C_Initialize`` where that
object says that the module is not initialised. The call fails where we did so before. So an object
of ours stands there, which says that it is: other code gets the module as we initialised it, with
the operating system's locks.

From then on the module is other code's too (`Initialization.lent`). Its handles would stand for
other sessions and keys after an initialisation anew: it would sign with a wrong key. So there is
none until other code calls its object's ``finalize``, nor is the module finalised when the last
signer closes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol

import pkcs11
from pkcs11 import _pkcs11

from d1_signer.backends.pkcs11.module.cryptoki import Cryptoki, place_of_list


class Lender(Protocol):
    """The module that is lent."""

    path: str
    cryptoki: Cryptoki

    def lend(self) -> None:
        """Have it initialised for other code, until it is taken back."""

    def take_back(self) -> None:
        """Other code says that it has done with it."""


class Lent(_pkcs11.lib):
    """python-pkcs11's object of a module, initialised by us and not to be finalised by others."""

    module: Lender
    complete = False

    @property
    def initialized(self) -> bool:  # type: ignore[override]  # read-only in the binding as well
        """Asked by `pkcs11.lib` before it gives the object out."""
        self.initialize()
        return True

    def initialize(self) -> None:
        """See to it that the module is initialised, by us."""
        self.module.lend()
        if not self.complete:
            self.complete = True
            super().__init__(self.module.path)  # asks the module for its name; comes back to here

    def finalize(self) -> None:
        """Other code has done with the module: it is ours alone, and finalised if we have, too."""
        self.module.take_back()


def offer(module: Lender) -> None:
    """Put an object of the module where `pkcs11.lib` looks for it, by either path."""
    registry: dict[str, Any] | None = getattr(pkcs11, "_loaded", None)
    if registry is None:
        return
    free = [path for path in _paths(module) if not _in_use(registry.get(path))]
    if not free:
        return
    made = Lent.__new__(Lent, module.path)  # type: ignore[call-arg]  # as in cryptoki.loaded
    place = place_of_list(made)
    if place is None or place.value != module.cryptoki.address:
        return  # an instance of its own (p11-kit's client), which other code initialises itself
    # Never freed: the binding calls a method of it then, which fails as the interpreter ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    made.module = module
    for path in free:
        registry[path] = made


def withdraw(module: Lender) -> None:
    """Take it away again; other code that comes later is on its own."""
    registry: dict[str, Any] = getattr(pkcs11, "_loaded", {})
    for path in _paths(module):
        if isinstance(registry.get(path), Lent):
            del registry[path]


def _in_use(item: Any) -> bool:
    return item is not None and (isinstance(item, Lent) or item.initialized)


def _paths(module: Lender) -> set[str]:
    return {module.path, os.path.realpath(module.path)}
