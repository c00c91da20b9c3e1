# SPDX-License-Identifier: Apache-2.0
"""Getting an access token: the fetcher, its store, and the endpoint."""
