# SPDX-License-Identifier: Apache-2.0
"""The audit trail: a record of every use of a key that nobody can alter unseen."""
