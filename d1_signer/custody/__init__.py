# SPDX-License-Identifier: Apache-2.0
"""Where private keys live: the evidence, the report on it, and the policy."""
