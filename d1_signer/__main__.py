# SPDX-License-Identifier: Apache-2.0
"""`python -m d1_signer`: the `d1-signer` command of this interpreter's installation."""

from __future__ import annotations

import sys

from d1_signer.cli import main

sys.exit(main())
