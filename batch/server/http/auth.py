"""Who may ask: keys, their owners, and the tokens that stand in for a key at an upload.

Owns the keys file, the check of the Authorization header and the table of what is open to everybody. A key is
`name:secret`, as `FAL_KEY` holds it for the official clients; the file keeps `name:sha256(secret)`. A plain SHA-256 is
enough here: a secret is 256 random bits, so there is no dictionary to try and nothing that a slow hash would slow down.
Several lines of one name are several keys of one owner: that is how a key is changed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from batch.errors import ConfigError, InputError
from batch.system.durable import sync

__all__ = [
    "ENVIRONMENT",
    "Access",
    "Authenticator",
    "Denied",
    "Key",
    "Keys",
    "Token",
    "access_of",
    "add_key",
    "load_keys",
    "owner_of",
    "set_owner",
]

ENVIRONMENT = "FAL_SERVER_KEYS"
"""Lines of a keys file, separated by white space or commas. Not RESTYLE_...: `restyle run` refuses names of those that
it does not know."""
TOKEN_SECONDS = 86400.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_NOBODY = hashlib.sha256(b"").digest()
"""Compared with where the name is unknown, so that it takes as long as a wrong secret."""


class Access(Enum):
    """What a route asks for."""

    OPEN = "nothing"
    KEY = "a key"
    UPLOAD = "a key, or a token that was given for one"


_OPEN = frozenset({"/", "/.well-known/jwks.json", "/health", "/openapi.json", "/v1/meta"})
"""Templates that are read without a key: none of them tells anything about a request."""
_READS = frozenset({"GET", "HEAD"})


def access_of(method: str, template: str) -> Access:
    """What a route asks for, by its template as it was registered. What is not named here needs a key.

    Files are read by whoever knows their name, as on fal; the path of an announced upload is its own permission; a
    browser asks without a key whether it may ask with one (OPTIONS).
    """
    if method == "OPTIONS" or template.startswith("/storage/upload/{"):
        return Access.OPEN
    if method in _READS and (template in _OPEN or template.startswith(("/files/", "/static/"))):
        return Access.OPEN
    return Access.UPLOAD if template.startswith("/files/") else Access.KEY


class Denied(Exception):
    """The caller may not ask.

    Args:
        status: 401 or 403.
        detail: as fal words it.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a keys file."""

    name: str
    digest: bytes
    """SHA-256 of the secret."""
    locked: str | None = None
    """Why its owner is locked; None: is not."""

    @property
    def line(self) -> str:
        """As it stands in the file."""
        return ":".join([self.name, self.digest.hex(), *([self.locked] if self.locked is not None else [])])


class Keys:
    """The keys that are good. None at all: the server is open, and has to stay on loopback."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._of: dict[str, list[Key]] = {}
        for key in keys:
            self._of.setdefault(key.name, []).append(key)

    def __bool__(self) -> bool:
        return bool(self._of)

    def __repr__(self) -> str:
        return f"Keys({sorted(self._of)})"

    def check(self, credentials: str) -> str:
        """The owner of a key `name:secret`. One SHA-256, and a comparison in constant time.

        Raises:
            Denied: 401 for a wrong or malformed key, 403 for one that is locked.
        """
        name, colon, secret = credentials.strip().partition(":")
        if not colon or not name or not secret:
            raise Denied(401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.")
        digest, found = hashlib.sha256(_sent(secret)).digest(), None
        keys = self._of.get(name, [])
        for key in keys or [Key("", _NOBODY)]:
            if hmac.compare_digest(key.digest, digest) and keys:
                found = key
        if found is None:
            raise Denied(401, "No user found for Key ID and Secret")
        return _unlocked(found)

    def owner(self, name: str) -> str:
        """The owner of that name, for a token that was given to him.

        Raises:
            Denied: all his keys were taken away or are locked.
        """
        keys = self._of.get(name, [])
        if not keys:
            raise Denied(401, "No user found for Key ID and Secret")
        return _unlocked(next((key for key in keys if key.locked is None), keys[0]))


class Token(NamedTuple):
    """Stands in for a key at an upload."""

    text: str
    expires_at: float


class Authenticator:
    """Says whose a call is.

    Args:
        keys: the good ones.
        secret: tokens are signed with it; the same as long as the data dir lives, so that tokens survive a restart.
        app_id: named to those who come without a key.
        clock: Unix seconds.
    """

    def __init__(self, keys: Keys, secret: bytes, app_id: str, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._secret = secret
        self._app_id = app_id
        self._clock = clock

    @property
    def keyed(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._keys)

    def owner(self, authorization: str | None, access: Access) -> str:
        """The caller's name; empty on a server without keys, and where nothing is asked for.

        Args:
            authorization: the header, if there was one; several are one, joined by ", ", and so no good key.
            access: what the route asks for.

        Raises:
            Denied: see there.
        """
        if not self._keys or access is Access.OPEN:
            return ""
        scheme, _, credentials = (authorization or "").partition(" ")
        match scheme.lower():
            case "key":
                return self._keys.check(credentials)
            case "bearer" if access is Access.UPLOAD:
                return self._keys.owner(self._name_in(credentials.strip()))
            case "":
                raise Denied(401, f'Cannot access application "{self._app_id}". Authentication is required')
            case _:
                raise Denied(401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.")

    def token(self, owner: str) -> Token:
        """A token for the uploads of that owner, good for a day. Nothing is remembered of it."""
        expires_at = self._clock() + TOKEN_SECONDS
        stem = f"{owner}.{int(expires_at)}"
        return Token(f"{stem}.{self._sign(stem)}", expires_at)

    def _name_in(self, token: str) -> str:
        stem, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._sign(stem).encode(), _sent(signature)):
            raise Denied(401, "The token is not one of this server; ask for a new one")
        name, _, expires_at = stem.rpartition(".")
        if int(expires_at) < self._clock():
            raise Denied(401, "The token has expired; ask for a new one")
        return name

    def _sign(self, stem: str) -> str:
        return hmac.new(self._secret, _sent(stem), hashlib.sha256).hexdigest()


def _sent(text: str) -> bytes:
    """Part of a header, as its bytes were sent: those that are not UTF-8 arrive as lone surrogates."""
    return text.encode("utf-8", "surrogateescape")


def load_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Keys of a file and of `FAL_SERVER_KEYS`, together.

    Args:
        path: lines `name:sha256`, or `name:sha256:reason` for a locked owner; empty ones and those that begin with #
            are passed over. None: no file.
        environment: variables of the process.

    Raises:
        ConfigError: the file cannot be read, holds no key, or a line of it is none. No secret is repeated.
    """
    keys = [_read(text, ENVIRONMENT) for text in re.split(r"[\s,]+", environment.get(ENVIRONMENT, "")) if text]
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the keys file {path} cannot be read: {error}; `restyle serve --keys {path} --new-key NAME` makes one"
            ) from error
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        found = [_read(line, f"{path}, line {number}") for number, line in numbered if line and line[0] != "#"]
        if not found:
            raise ConfigError(f"{path} holds no key; `restyle serve --keys {path} --new-key NAME` adds one")
        keys += found
    return Keys(tuple(keys))


def add_key(path: Path, name: str, secret: str) -> str:
    """Append a key to the file, which is made with mode 0600 where there is none; the key as its owner needs it.

    Args:
        path: the keys file.
        name: of the owner; it shows in webhooks and in the server's log.
        secret: random, 256 bits or more, without a colon or white space.

    Raises:
        InputError: the name cannot be one, or the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be a key's name; take up to 64 letters, digits, dots, dashes, underscores")
    key = Key(name, hashlib.sha256(secret.encode()).digest())
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:  # noqa: PTH123 - mode set
            file.seek(0)
            separator = "" if file.read()[-1:] in {b"", b"\n"} else "\n"
            file.write(f"{separator}{key.line}\n".encode())
        sync(path)
    except OSError as error:
        raise InputError(f"the keys file {path} cannot be written: {error}; choose another with --keys") from error
    return f"{name}:{secret}"


def _unlocked(key: Key) -> str:
    if key.locked is not None:
        raise Denied(403, f"User is locked. Reason: {key.locked}")
    return key.name


def _read(line: str, where: str) -> Key:
    name, _, rest = line.partition(":")
    digest, colon, reason = rest.partition(":")
    if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest):
        raise ConfigError(
            f"{where} is not a key: it has to be name:sha256, as `restyle serve --keys FILE --new-key NAME` writes it"
        )
    return Key(name, bytes.fromhex(digest), (reason.strip() or "Admin lock") if colon else None)


# Newer versions of aiohttp warn of keys that are plain strings, older ones have no others.
_OWNER: Any = web.RequestKey("owner", str) if hasattr(web, "RequestKey") else "owner"


def set_owner(request: web.Request, owner: str) -> None:
    """Note whose the call is: his name, or nothing where nobody was asked for a key."""
    request[_OWNER] = owner


def owner_of(request: web.Request) -> str:
    """The caller's name; empty on a server without keys, and on routes that are open to everybody."""
    owner: str = request.get(_OWNER, "")
    return owner
