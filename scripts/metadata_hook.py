# SPDX-License-Identifier: Apache-2.0
"""What a package index shows: the README with links that lead somewhere, and addresses.

README's links are relative, for whoever reads it beside the code. Where that is published, whoever
makes a release knows: D1_SIGNER_REPOSITORY has the address, set by `scripts/release --repository`,
and links lead to the files of the release's tag there. Without it they are plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\[([^\[\]]+)\]\((?![a-z]+:)([^()\s]+)\)")
_DOCUMENTED_BY_THALES = "https://docs.payments.thalescloud.io"


class IndexPage(MetadataHookInterface):
    """Sets ``readme`` and ``urls``, which pyproject.toml names as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add them to what pyproject.toml says."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        urls = {"D1 API by Thales": _DOCUMENTED_BY_THALES}
        repository = os.environ.get("D1_SIGNER_REPOSITORY", "").rstrip("/")
        if repository:
            files = f"{repository}/blob/v{metadata['version']}"
            readme = _LINK.sub(rf"[\1]({files}/\2)", readme)
            urls |= {
                "Source": repository,
                "Documentation": f"{files}/docs",
                "Changelog": f"{files}/CHANGELOG.md",
                "Security": f"{files}/SECURITY.md",
            }
        else:
            readme = _LINK.sub(r"\1", readme)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = urls
