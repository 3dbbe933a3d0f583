"""The settings that every HTTP session of the package has; what differs is the connector."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

__all__ = ["open_session"]


def open_session(
    connector: aiohttp.BaseConnector, timeout: aiohttp.ClientTimeout, headers: Mapping[str, str]
) -> aiohttp.ClientSession:
    """Open a session without cookies, decompression or proxies from the environment.

    Bodies arrive as they were sent, so that limits in bytes hold. Proxies are chosen per request, where they are used.
    """
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        headers={"accept-encoding": "identity", "user-agent": "restyle", **headers},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )
