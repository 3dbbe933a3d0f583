"""Authentication: the keys file, the Authorization header, and the separation of owners."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import subprocess
import sys

import pytest

from batch.cli.main import main
from batch.errors import ConfigError, InputError
from batch.fal.endpoint import APP_ID
from batch.server.http.auth import (
    ENVIRONMENT,
    TOKEN_SECONDS,
    Access,
    Authenticator,
    Denied,
    Key,
    Keys,
    access_of,
    add_key,
    load_keys,
)
from batch.server.serve import ServeOptions, serve
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, read, serving, submit

SECRETS = {"alice": "a" * 43, "bob": "b" * 43, "eve": "e" * 43}
HEADERS = {name: {"authorization": f"Key {name}:{secret}"} for name, secret in SECRETS.items()}


def digest(secret):
    return hashlib.sha256(secret.encode()).digest()


def some_keys():
    locked = Key("eve", digest(SECRETS["eve"]), "Exhausted balance.")
    return Keys((*(Key(name, digest(SECRETS[name])) for name in ("alice", "bob")), locked))


def authenticator(keys=None, now=lambda: 1000.0, secret=b"s" * 32):
    return Authenticator(some_keys() if keys is None else keys, secret, APP_ID, now)


def denied(header, access=Access.KEY, **options):
    with pytest.raises(Denied) as caught:
        authenticator(**options).owner(header, access)
    return caught.value.status, caught.value.detail


# --- the file ---------------------------------------------------------------------------------------------


def test_a_new_key_works_and_its_secret_is_not_kept(tmp_path):
    """The file has mode 0600 and contains a hash; the returned key is a valid `FAL_KEY`."""
    path = tmp_path / "keys"
    keys = [add_key(path, name, SECRETS[name]) for name in ("alice", "bob")]
    assert keys == [f"{name}:{SECRETS[name]}" for name in ("alice", "bob")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert not any(secret in text for secret in SECRETS.values())
    good = load_keys(path, {})
    assert [good.check(key) for key in keys] == ["alice", "bob"]


def test_an_owner_can_rotate_keys(tmp_path):
    """Both keys of one name are valid; a removed one is not."""
    path = tmp_path / "keys"
    path.write_text("# the team's keys", "ascii")  # without a line break at its end
    old, new = add_key(path, "alice", "old"), add_key(path, "alice", "new")
    assert [load_keys(path, {}).check(key) for key in (old, new)] == ["alice", "alice"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", lines[2], ""]))
    assert load_keys(path, {}).check(new) == "alice"
    with pytest.raises(Denied):
        load_keys(path, {}).check(old)


def test_the_variable_contains_lines_of_a_keys_file(tmp_path):
    """Keys are separated by commas or white space, and combined with those of a file."""
    path = tmp_path / "keys"
    in_file = add_key(path, "alice", SECRETS["alice"])
    lines = [Key(name, digest(SECRETS[name])).line for name in ("bob", "eve")]
    good = load_keys(path, {ENVIRONMENT: f" {lines[0]},\n{lines[1]} "})
    assert [good.check(key) for key in (in_file, f"bob:{SECRETS['bob']}", f"eve:{SECRETS['eve']}")] == sorted(SECRETS)
    assert not load_keys(None, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice:" + "0" * 64 + "\nbob:secret", "line 2"),
        ("alice", "line 1"),
        ("a b:" + "0" * 64, "line 1"),
        ("alice:" + "0" * 63, "line 1"),
        ("# nothing\n\n", "contains no key"),
        (None, "cannot read"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_an_invalid_keys_file_is_one_clear_sentence(tmp_path, text, words):
    """The message contains the line number and the expected format, never the content, which may be a secret."""
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        load_keys(path, {})
    assert "--new-key" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "a" * 65, "ä", "a\nb"])
def test_an_invalid_key_name_is_rejected(tmp_path, name):
    """The file is not created."""
    with pytest.raises(InputError, match="name"):
        add_key(tmp_path / "keys", name, "x")
    assert not (tmp_path / "keys").exists()


# --- the header -------------------------------------------------------------------------------------------


def test_a_key_determines_the_owner_of_a_call():
    """`Key name:secret`; the scheme is case-insensitive."""
    for scheme in ("Key", "key", "KEY"):
        assert authenticator().owner(f"{scheme} alice:{SECRETS['alice']}", Access.KEY) == "alice"
    assert authenticator().owner(None, Access.OPEN) == ""
    assert authenticator(Keys()).owner("Key anything", Access.KEY) == ""
    assert authenticator(Keys()).owner(None, Access.KEY) == ""


@pytest.mark.parametrize(
    ("header", "status", "detail"),
    [
        (None, 401, f'Cannot access application "{APP_ID}"'),
        ("", 401, f'Cannot access application "{APP_ID}"'),
        ("Key", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Key alice", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Key alice:", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Key :x", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Basic YTpi", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Bearer x", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Key alice:wrong", 401, "No user found for Key ID and Secret"),
        ("Key unknown:" + "a" * 43, 401, "No user found for Key ID and Secret"),
        ("Key alice:" + "b" * 43, 401, "No user found for Key ID and Secret"),
        (f"Key alice:{SECRETS['alice']}, Key alice:{SECRETS['alice']}", 401, "No user found for Key ID and Secret"),
        ("Key \udcff:\udcff", 401, "No user found for Key ID and Secret"),
        ("\udcff \udcff", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Bearer \udcff", 401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."),
        ("Key alice:\udcff", 401, "No user found for Key ID and Secret"),
        (f"Key eve:{SECRETS['eve']}", 403, "User is locked. Reason: Exhausted balance."),
        ("Key eve:wrong", 401, "No user found for Key ID and Secret"),
    ],
)
def test_an_invalid_header_is_rejected_with_fal_s_message(header, status, detail):
    """401 does not reveal whether the name or the secret is wrong; 403 is only for a valid, locked key."""
    found, words = denied(header)
    assert found == status
    assert words.startswith(detail)


def test_the_hash_of_the_empty_secret_is_not_a_key():
    """The placeholder that is compared for unknown names is not a valid key."""
    assert denied("Key unknown:")[0] == 401
    keys = Keys((Key("alice", digest("x")),))
    with pytest.raises(Denied):
        keys.check(":")


def test_a_token_replaces_a_key_for_uploads_only():
    """It is valid for a day, across restarts, and ends with its owner's key."""
    door = authenticator()
    token = door.token("alice")
    assert token.expires_at == 1000.0 + TOKEN_SECONDS
    header = f"Bearer {token.text}"
    assert door.owner(header, Access.UPLOAD) == "alice"
    assert authenticator().owner(header, Access.UPLOAD) == "alice"  # the next server on the same data dir
    assert denied(header, Access.KEY)[0] == 401
    assert denied(header, Access.UPLOAD, now=lambda: 1001.0 + TOKEN_SECONDS)[0] == 401
    assert denied(header, Access.UPLOAD, secret=b"t" * 32)[0] == 401
    assert denied(header, Access.UPLOAD, keys=Keys((Key("bob", digest("x")),)))[0] == 401
    assert denied(f"Bearer {door.token('eve').text}", Access.UPLOAD)[0] == 403


@pytest.mark.parametrize(
    "change",
    [
        *(lambda t: "bob" + t[5:], lambda t: t[:-1] + "x", lambda t: "", lambda t: "a.b.c", lambda t: "é" + t),
        *(lambda t: "\udcff", lambda t: "\udcff" + t, lambda t: t + "\udcff", lambda t: "a.1.\udcff"),
    ],
)
def test_a_changed_token_is_invalid(change):
    """Another owner, another signature, an empty or malformed token, bytes that are not UTF-8."""
    assert denied(f"Bearer {change(authenticator().token('alice').text)}", Access.UPLOAD)[0] == 401


@pytest.mark.parametrize(
    ("method", "template", "access"),
    [
        ("GET", "/", Access.OPEN),
        ("GET", "/health", Access.OPEN),
        ("GET", "/.well-known/jwks.json", Access.OPEN),
        ("GET", "/openapi.json", Access.OPEN),
        ("GET", "/v1/meta", Access.OPEN),
        ("HEAD", "/files/{prefix}/{name}", Access.OPEN),
        ("PUT", "/storage/upload/{token}{path:/files/.+}", Access.OPEN),
        ("POST", "/files/upload", Access.UPLOAD),
        ("POST", "/", Access.KEY),
        ("*", "/{path:.*}", Access.KEY),
        ("GET", "/metrics", Access.KEY),
        ("GET", "/page/state", Access.KEY),
        ("POST", "/storage/upload/initiate", Access.KEY),
        ("POST", "/storage/auth/token", Access.KEY),
        ("GET", "/v1/models/requests/by-endpoint", Access.KEY),
        ("GET", "/whatever/comes", Access.KEY),
    ],
)
def test_a_route_requires_a_key_unless_it_is_public(method, template, access):
    """A new route requires a key by default."""
    assert access_of(method, template) is access


# --- over HTTP --------------------------------------------------------------------------------------------


def test_every_route_with_data_requires_a_key(tmp_path):
    """Submit, direct call, reads, listing, metrics and uploads return 401 JSON with a request id; health is public."""
    closed = [
        ("POST", SUBMIT),
        ("POST", f"/run{SUBMIT}"),
        ("GET", read("0" * 36, "/status")),
        ("GET", read("0" * 36, "/status/stream")),
        ("GET", read("0" * 36)),
        ("PUT", read("0" * 36, "/cancel")),
        ("GET", "/metrics"),
        ("GET", "/page/state"),
        ("GET", f"/v1/models/requests/by-endpoint?endpoint_id={APP_ID}"),
        ("POST", "/storage/auth/token"),
        ("POST", "/storage/upload/initiate"),
        ("POST", "/files/upload"),
        ("GET", "/nothing/here"),
        ("GET", "/files/../fal-ai/flux/requests/" + "0" * 36),
    ]

    async def use():
        async with serving(tmp_path, keys=some_keys()) as session:
            for method, path in closed:
                status, headers, body = await call(session, method, path, data=b"{}")
                assert status == 401, path
                assert headers["x-fal-request-id"]
                words = body["error"]["message"] if path.startswith("/v1/") else body["detail"]
                assert words.startswith("Cannot access application"), path
            assert (await call(session, "POST", SUBMIT, json=INPUT, headers=HEADERS["eve"]))[0] == 403
            for path in ("/health", "/.well-known/jwks.json"):
                assert (await call(session, "GET", path))[0] == 200
            async with session.get("/files/00/" + "0" * 32) as response:
                assert response.status == 404
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 0

    asyncio.run(use())


def test_requests_are_invisible_to_other_owners(tmp_path):
    """Status, stream, result, cancel, listing and the page return 404 or nothing, never 403."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine, keys=some_keys()) as session:
            ours = await submit(session, "hold", headers=HEADERS["alice"])

            async def seen_by(name):
                found = []
                for method, tail in (("GET", "/status"), ("GET", "/status/stream"), ("GET", ""), ("PUT", "/cancel")):
                    async with session.request(method, read(ours, tail), headers=HEADERS[name]) as response:
                        found.append((response.status, await response.read() if response.status == 404 else b""))
                return found

            async def listed_by(name):
                path = f"/v1/models/requests/by-endpoint?endpoint_id={APP_ID}"
                _, _, listing = await call(session, "GET", path, headers=HEADERS[name])
                _, _, page = await call(session, "GET", "/page/state", headers=HEADERS[name])
                return len(listing["items"]), len(page["requests"])

            nothing = (404, b'{"status":"NOT_FOUND"}')
            assert await seen_by("bob") == [nothing] * 4
            assert not engine.go.is_set()
            assert (await call(session, "GET", read(ours, "/status"), headers=HEADERS["alice"]))[0] == 202
            engine.go.set()
            session.headers.update(HEADERS["alice"])
            assert (await completed(session, ours))["status"] == "COMPLETED"
            assert await seen_by("bob") == [nothing] * 4
            assert await listed_by("bob") == (0, 0)
            assert await listed_by("alice") == (1, 1)
        async with serving(tmp_path, keys=some_keys()) as session:  # the owner is stored
            assert (await call(session, "GET", read(ours), headers=HEADERS["alice"]))[0] == 200
            assert (await call(session, "GET", read(ours), headers=HEADERS["bob"]))[0] == 404

    asyncio.run(use())


def test_a_waiting_request_keeps_its_owner_after_a_restart(tmp_path):
    """The owner of an unfinished request is restored, too."""

    async def use():
        async with serving(tmp_path, keys=some_keys()) as session:
            ours = await submit(session, "hold", headers=HEADERS["alice"])
        engine = ScriptedEngine()
        async with serving(tmp_path, engine, keys=some_keys()) as session:
            assert (await call(session, "GET", read(ours, "/status"), headers=HEADERS["alice"]))[0] == 202
            assert (await call(session, "GET", read(ours, "/status"), headers=HEADERS["bob"]))[0] == 404

    asyncio.run(use())


def test_idempotency_keys_are_separate_per_owner(tmp_path):
    """The same key from another owner is a different request."""

    async def use():
        async with serving(tmp_path, keys=some_keys()) as session:
            found = {}
            for name in ("alice", "bob", "alice", "bob"):
                headers = HEADERS[name] | {"idempotency-key": "k"}
                found.setdefault(name, set()).add(await submit(session, f"for {name}", headers=headers))
            assert [len(ids) for ids in found.values()] == [1, 1]
            assert found["alice"].isdisjoint(found["bob"])
            changed = HEADERS["bob"] | {"idempotency-key": "k"}
            assert (await call(session, "POST", SUBMIT, json=INPUT, headers=changed))[0] == 422

    asyncio.run(use())


def test_an_upload_accepts_a_key_or_its_token(tmp_path):
    """Upload with the headers of fal's Python client; the file is readable without a key."""

    async def use():
        async with serving(tmp_path, keys=some_keys()) as session:
            _, _, token = await call(session, "POST", "/storage/auth/token", json={}, headers=HEADERS["alice"])
            for authorization in (f"{token['token_type']} {token['token']}", HEADERS["bob"]["authorization"]):
                headers = {"authorization": authorization, "content-type": "image/png"}
                status, _, body = await call(session, "POST", "/files/upload", data=b"x", headers=headers)
                assert status == 200
                async with session.get(body["access_url"]) as response:
                    assert await response.read() == b"x"
            bad = {"authorization": "Bearer " + token["token"] + "0"}
            assert (await call(session, "POST", "/files/upload", data=b"x", headers=bad))[0] == 401
            _, _, ticket = await call(session, "POST", "/storage/upload/initiate", json={}, headers=HEADERS["alice"])
            assert (await call(session, "PUT", ticket["upload_url"], data=b"y"))[0] == 200

    asyncio.run(use())


# --- the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_the_server_is_local_only(tmp_path, host):
    """A server without keys on a public address does not start; the message says how to create a key."""

    async def use(**options):
        stop = asyncio.Event()
        url = []

        def ready(where):
            url.append(where)
            stop.set()

        given = ServeOptions(tmp_path, host=host, port=0, **options)
        await serve(given, ready=ready, engine=ScriptedEngine(), stop=stop)
        return url

    with pytest.raises(ConfigError, match="loopback only") as caught:
        asyncio.run(use())
    assert caught.value.exit_code == 2
    assert "--new-key" in str(caught.value)
    assert asyncio.run(use(keys=some_keys()))


def test_the_command_creates_a_key_and_rejects_an_open_server(tmp_path, capsys, monkeypatch):
    """`--new-key` prints only the key; a public `--host` without keys ends with exit code 2 and one sentence."""
    path = tmp_path / "keys"

    def command(*arguments):
        return main(["serve", *arguments]), *capsys.readouterr()

    code, printed, _ = command("--keys", str(path), "--new-key", "alice")
    assert code == 0
    key = printed.strip()
    assert load_keys(path, {}).check(key) == "alice"
    assert len(key) >= len("alice:") + 43
    code, printed, said = command("--new-key", "alice")
    assert (code, printed) == (2, "")
    assert "--keys FILE" in said
    code, _, said = command("--host", "0.0.0.0", "--data-dir", str(tmp_path / "data"), "--port", "0")
    assert code == 2
    assert "loopback only" in said
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    code, _, said = command("--data-dir", str(tmp_path / "data"))
    assert code == 2
    assert ENVIRONMENT in said


def test_an_embedded_endpoint_ignores_the_keys_of_another_server(tmp_path):
    """`FAL_SERVER_KEYS` of another server on the machine does not affect a run's own endpoint."""
    environment = os.environ | {ENVIRONMENT: Key("alice", digest("x")).line}
    command = [sys.executable, "-m", "batch.server", "--data-dir", str(tmp_path), "--engine", "echo"]
    ended = subprocess.run(
        [*command, "--with-parent", "--host", "0.0.0.0"],
        env=environment,
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "loopback only" in ended.stderr
