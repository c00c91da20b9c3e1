# SPDX-License-Identifier: Apache-2.0
"""The closed list of where a secret may show, each with the reason."""

from __future__ import annotations

import logging

# Logger, the level up to which its lines are left out, the reason.
LOGGERS = (
    ("authlib", logging.CRITICAL, "a server of the tests, which logs what it issues"),
    (
        "botocore",
        logging.DEBUG,
        "SECURITY.md: At DEBUG, botocore logs its own requests to AWS with the session token",
    ),
)

# A part of the path of the file that writes, the reason.
WRITERS = (
    ("d1_signer/backends/pem.py", "generate_key makes the key's file, which is its purpose"),
    ("d1_signer/sandbox/", "SECURITY.md: in the sandbox, and in the test doubles"),
    ("d1_signer/testing/", "SECURITY.md: in the sandbox, and in the test doubles"),
)

# A part of the path of the code whose variables are not looked at, the reason.
FRAMES = (
    ("d1_signer/cli/", "the command's arguments, which the process list shows; no error leaves it"),
    ("site-packages/click/", "the same"),
)
# The name of a file that others write in a test's folder, the reason.
FILES = (("spy.log", "OpenSC's spy writes down what is given to the module, the PIN as well"),)


def line_is_left_out(record: logging.LogRecord) -> bool:
    return any(
        record.name.split(".")[0] == name and record.levelno <= level for name, level, _ in LOGGERS
    )


def frame_is_left_out(code: str) -> bool:
    return any(part in code for part, _ in FRAMES)


def file_is_left_out(writer: str) -> bool:
    return any(part in writer for part, _ in WRITERS)
