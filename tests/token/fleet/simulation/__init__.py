# SPDX-License-Identifier: Apache-2.0
"""The real decisions of fetcher, renewal, fleet and signer set, on simulated time.

Threads are real and one of them runs at a time; who runs next, and when, is decided by a seeded
generator. Doubles stand for D1, the store and the signing device and behave like them, on a plan of
faults. A seed that fails is run again with ``python -m tests.token.fleet.simulation SEED``.
"""
