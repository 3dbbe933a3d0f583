"""The web page over HTTP, without a browser: security headers, content and access."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

from batch.server.engines.base import EngineInfo
from batch.server.http.auth import Key, Keys
from tests.edges.serving import ScriptedEngine, call, completed, serving, submit

OWN_FILES = ("icon.svg", "page.css", "page.js", "api.js", "live.js", "playground.js", "recent.js")


def run(coroutine):
    return asyncio.run(coroutine)


async def text(session, path, **options):
    async with session.get(path, **options) as response:
        return response, await response.text()


async def requests(session, **options):
    """Return the requests that the page lists."""
    status, _, body = await call(session, "GET", "/page/state", **options)
    assert status == 200, body
    return body["requests"]


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/page/state"])
def test_security_headers_forbid_foreign_content(tmp_path, path):
    """No inline script or style, no other origin, no frame, no MIME sniffing, no referrer."""

    async def use():
        async with serving(tmp_path) as session, session.get(path) as response:
            return response.status, response.headers

    status, headers = run(use())
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert status == 200
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy["img-src"] == "'self' blob:"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_needs_nothing_but_its_own_files(tmp_path):
    """Each file that the page or its scripts reference exists; there is no other host and no inline code."""

    async def use():
        async with serving(tmp_path) as session:
            _, page = await text(session, "/")
            files = {name: await text(session, f"/static/{name}") for name in OWN_FILES}
            return page, files

    page, files = run(use())
    assert all(response.status == 200 for response, _ in files.values())
    scripts = "".join(body for name, (_, body) in files.items() if name.endswith(".js"))
    named = set(re.findall(r'(?:src|href)="/static/([^"]+)"', page)) | set(re.findall(r'from "\./([^"]+)"', scripts))
    assert named == set(OWN_FILES)
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", scripts) == []
    assert re.findall(r"(?:src|href|url\()=?\"?https?:", page + files["page.css"][1]) == []


def test_unchanged_files_are_not_sent_again(tmp_path):
    """A request with the ETag returns 304 without a body."""

    async def use():
        async with serving(tmp_path) as session:
            response, body = await text(session, "/static/page.css")
            again, nothing = await text(
                session, "/static/page.css", headers={"if-none-match": response.headers["etag"]}
            )
            other, _ = await text(session, "/static/page.css", headers={"if-none-match": '"another"'})
            return body, again.status, nothing, other.status

    body, status, nothing, other = run(use())
    assert len(body) > 1000
    assert (status, nothing, other) == (304, "", 200)


@pytest.mark.parametrize("name", ["nothing.js", "..%2froutes.py", "%2fetc%2fpasswd", "page.html"])
def test_only_the_page_s_files_are_served(tmp_path, name):
    """No path reaches other files on the disk."""

    async def use():
        async with serving(tmp_path) as session:
            return (await text(session, f"/static/{name}"))[0].status

    assert run(use()) == 404


def test_names_from_the_engine_are_escaped(tmp_path):
    """Model names are untrusted and are escaped."""

    class Named(ScriptedEngine):
        def info(self):
            return EngineInfo("own", "<script>alert(1)</script>", '"7"', "<b>checked</b>", 2, fetches_source=False)

    async def use():
        async with serving(tmp_path, Named()) as session:
            return (await text(session, "/"))[1]

    page = run(use())
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;checked&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "not checked" not in page
    assert "no model runs" not in page


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_another_site_cannot_read_the_state(tmp_path, site, status):
    """Without keys, the server trusts its machine, but not every page open in its browser."""

    async def use():
        async with serving(tmp_path) as session:
            return (await call(session, "GET", "/page/state", headers={"sec-fetch-site": site}))[0]

    assert run(use()) == status


def test_the_state_follows_a_request_from_the_queue_to_its_end(tmp_path):
    """Waiting with its position, running, done with image and seed; newest first."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            first = await submit(session, "hold", seed=2**62 + 1)
            await submit(session, "second")
            third = await submit(session, "third")
            before = await requests(session)
            engine.go.set()
            await completed(session, third)
            _, _, state = await call(session, "GET", "/page/state")
            return first, before, state

    first, before, state = run(use())
    assert [(one["prompt"], one["state"], one["position"]) for one in before] == [
        ("third", "waiting", 1),
        ("second", "waiting", 0),
        ("hold", "running", None),
    ]
    last = state["requests"][-1]
    assert (last["id"], last["state"], last["seed"], last["seconds"]) == (first, "done", str(2**62 + 1), 0.5)
    assert last["images"][0]["image"].startswith("/files/")
    assert last["source"] == {"image": None, "name": "example.com"}
    assert (state["finished"], state["failed"], state["waiting"], state["running"]) == (3, 0, 0, 0)


def test_a_long_queue_shows_its_head_and_its_newest_requests(tmp_path):
    """The list is bounded, with the head of the queue and the newest requests."""

    async def use():
        async with serving(tmp_path, ScriptedEngine(slots=1)) as session:
            for n in range(3):
                await completed(session, await submit(session, f"done {n}"))
            for n in range(100):
                await submit(session, f"hold {n}")
            return await requests(session)

    shown = [one["prompt"] for one in run(use())]
    assert len(shown) <= 24
    assert shown[0] == "hold 99"
    assert shown[-4:] == ["hold 0", "done 2", "done 1", "done 0"]
    assert "hold 50" not in shown


def test_the_list_survives_a_restart(tmp_path):
    """The list is read from the store."""

    async def use():
        async with serving(tmp_path) as session:
            await completed(session, await submit(session, "from before"))
        async with serving(tmp_path) as session:
            return await requests(session)

    (one,) = run(use())
    assert (one["prompt"], one["state"]) == ("from before", "done")


def test_owners_see_only_their_own_requests(tmp_path):
    """With keys, the page is public, and its state requires a key."""
    keys = Keys(tuple(Key(name, hashlib.sha256(name.encode()).digest()) for name in ("ann", "bob")))
    ann, bob = ({"authorization": f"Key {name}:{name}"} for name in ("ann", "bob"))

    async def use():
        async with serving(tmp_path, keys=keys) as session:
            for n in range(30):
                await completed(session, await submit(session, f"of ann {n}", headers=ann))
            await completed(session, await submit(session, "of bob", headers=bob))
            page, static = (await text(session, "/"))[0].status, (await text(session, "/static/page.js"))[0].status
            refused = [
                (await call(session, "GET", "/page/state", headers=headers))[0]
                for headers in ({}, {"authorization": "Key ann:bob"})
            ]
            return page, static, refused, await requests(session, headers=ann), await requests(session, headers=bob)

    page, static, refused, of_ann, of_bob = run(use())
    assert (page, static, refused) == (200, 200, [401, 401])
    assert [one["prompt"] for one in of_bob] == ["of bob"]
    assert {one["prompt"][:6] for one in of_ann} == {"of ann"}
    assert len(of_ann) <= 24
