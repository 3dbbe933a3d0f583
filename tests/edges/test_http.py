"""HTTP sessions of the client side: which proxy a request uses, and what is never sent."""

from __future__ import annotations

import ast
import asyncio

import aiohttp
import pytest

from batch.errors import ConfigError
from batch.fal.client import FalClient
from batch.fal.endpoint import APP_ID
from batch.fal.http import Proxies
from batch.fal.protocol import Origins
from batch.fal.status_stream import StatusStreams
from batch.fal.webhook_receiver import WebhookReceiver
from batch.types import RequestId, Ticket
from tests.unit.test_layers import SOURCES, tree_of

FAR = "http://far.test:8787"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Clear the developer's own proxy settings; return a function that sets one."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def setting(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return setting


def chosen(url: str) -> str | None:
    found = Proxies().of(url)
    return None if found is None else str(found)


# --- which proxy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, FAR, None),
        ({"HTTP_PROXY": "http://p:1"}, FAR, "http://p:1"),
        ({"http_proxy": "http://p:1"}, FAR, "http://p:1"),
        ({"HTTP_PROXY": "p:1"}, FAR, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, FAR, None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://queue.fal.run/x", "http://p:1"),
        ({"ALL_PROXY": "http://p:1"}, "https://queue.fal.run/x", "http://p:1"),
        ({"ALL_PROXY": "http://p:1", "HTTPS_PROXY": "http://q:2"}, "https://queue.fal.run/x", "http://q:2"),
        ({"ALL_PROXY": "socks5://p:1", "HTTPS_PROXY": "http://q:2"}, "https://queue.fal.run/x", "http://q:2"),
        ({"HTTP_PROXY": ""}, FAR, None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, FAR, None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "far.test"}, FAR, None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": ".test"}, FAR, None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "far.test:8787"}, FAR, None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "far.test:80"}, FAR, "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "ar.test, other.test"}, FAR, "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "a.test, 10.0.0.0/8"}, "http://10.20.30.40:8787/x", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.20.30.40/x", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "fd00::/8"}, "http://[fd00::1]/x", None),
        ({"HTTP_PROXY": "http://me:a%23b@p:1"}, FAR, "http://me:a%23b@p:1"),
    ],
)
def test_the_proxy_is_the_one_that_the_environment_names(environment, variables, url, expected):
    """By scheme, in either case, with exceptions by host, port and network."""
    environment(**variables)
    assert chosen(url) == expected


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "a.localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_never_reached_through_a_proxy(environment, host):
    """Whatever `NO_PROXY` says: the embedded endpoint is local, and a remote proxy cannot reach it."""
    environment(HTTP_PROXY="http://p:1", HTTPS_PROXY="http://p:1", ALL_PROXY="http://p:1", NO_PROXY="far.test")
    assert chosen(f"http://{host}:8787/x") is None
    assert chosen(f"https://{host}/x") is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks5://me:pass%23word@p:1", "ALL_PROXY names a SOCKS proxy"),
        ("socks5h://p:1", "ALL_PROXY names a SOCKS proxy"),
        ("http://me:pass#word@p:1", "ALL_PROXY is not the address of a proxy.*%23 for #"),
        ("ftp://p:1", "ALL_PROXY is not the address of a proxy"),
        ("http://", "ALL_PROXY is not the address of a proxy"),
        ("http://p:port", "ALL_PROXY is not the address of a proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_stops_the_command(environment, value, words):
    """With the name of the variable, without its value; nothing is sent directly instead."""
    environment(ALL_PROXY=value)
    with pytest.raises(ConfigError, match=words) as caught:
        Proxies().check(FAR)
    assert "word" not in str(caught.value).replace("password", "")
    with pytest.raises(aiohttp.InvalidURL):
        Proxies().of(FAR)
    Proxies().check("http://127.0.0.1:8787")

    async def use():
        async with FalClient(Origins.of_server(FAR), APP_ID):
            pass

    with pytest.raises(ConfigError):
        asyncio.run(use())


# --- what is sent -----------------------------------------------------------------------------------------


def test_no_password_of_netrc_is_sent_by_any_session(environment, monkeypatch, tmp_path):
    """Client, streams and webhook keys, each through a proxy: an entry for every host must not be sent."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login alice password netrc-word\n")
    netrc.chmod(0o600)
    seen = []

    async def use():
        async def handle(reader, writer):
            seen.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
            writer.write(b"HTTP/1.1 500 no\r\nconnection: close\r\n\r\n")
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            environment(HTTP_PROXY=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", NETRC=str(netrc))
            origins, ticket = Origins.of_server(FAR), Ticket(RequestId("request-1"))
            async with FalClient(origins, APP_ID, connections=4) as client:
                for call in (client.status(ticket), client.download(f"{FAR}/a.png"), client.download("http://x.test/")):
                    with pytest.raises(Exception, match="500"):
                        await call
            async with StatusStreams(origins, APP_ID, None) as streams:
                await streams.wait(ticket, 0.0, 5.0)
            async with (
                WebhookReceiver("127.0.0.1:0", None, FAR) as callbacks,
                aiohttp.ClientSession() as sender,
                sender.post(callbacks.url, data=b"{}") as answer,
            ):
                assert answer.status == 503  # the keys cannot be read

    asyncio.run(use())
    assert len(seen) == 5
    assert not any("authorization" in head for head in seen)


def test_every_session_is_opened_in_one_place():
    """Rules for limits and headers hold only if every session has them; the two connectors differ on purpose."""
    made = {
        (node.func.attr, name)
        for name in SOURCES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"ClientSession", "TCPConnector"}
    }
    assert made == {
        ("ClientSession", "batch.system.http_session"),
        ("TCPConnector", "batch.fal.http"),
        ("TCPConnector", "batch.server.egress.http_client"),
    }
