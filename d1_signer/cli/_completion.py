# SPDX-License-Identifier: Apache-2.0
"""Completion in bash, which breaks a word at the colons and equals signs that key URIs have."""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, CompletionItem, split_arg_string

_ADDED = "COMPREPLY+=($value)"
# No blank behind what goes on.
_ADDED_TO_GO_ON = f"{_ADDED}; [[ $value == *[:/] ]] && compopt -o nospace"


class Bash(BashComplete):
    """Puts the parts of words together, and answers with what stands for the last part."""

    source_template = BashComplete.source_template.replace(_ADDED, _ADDED_TO_GO_ON)
    _before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one that is completed, and that one, see `BashComplete`."""
        parts = split_arg_string(os.environ["COMP_WORDS"])
        at = int(os.environ["COMP_CWORD"])
        words: list[list[str]] = []
        for part in parts[: at + 1]:
            if words and (_breaks(part) or _breaks(words[-1][-1])):
                words[-1].append(part)
            else:
                words.append([part])
        last = words.pop() if at < len(parts) else []
        incomplete = "".join(last)
        # In front of the cursor bash keeps what it has broken off.
        self._before = incomplete if last and _breaks(last[-1]) else "".join(last[:-1])
        if self._before.startswith("-"):
            self._before = self._before.partition("=")[2]  # click takes the option's name away
        return ["".join(word) for word in words[1:]], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """What the shell's script reads, see `BashComplete`."""
        return f"{item.type},{item.value.removeprefix(self._before)}"


def _breaks(part: str) -> bool:
    return not part.strip(":=")
