# SPDX-License-Identifier: Apache-2.0
"""Sessions on a token: the login, the pool, time limits, and coming back after a failure."""
