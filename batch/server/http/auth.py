"""Authentication: API keys, their owners, and tokens that replace a key for uploads.

Defines the keys file, the check of the Authorization header and the list of public routes. A key is `name:secret`, as
the official clients expect in `FAL_KEY`; the file contains `name:sha256(secret)`. Plain SHA-256 is sufficient, because
secrets are 256 random bits and cannot be guessed. Several lines with the same name are keys of the same owner, which
allows key rotation.
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
"""Lines of a keys file, separated by white space or commas. Without the prefix RESTYLE_, because `restyle run` rejects
unknown names with that prefix."""
TOKEN_SECONDS = 86400.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_NO_KEY = hashlib.sha256(b"").digest()
"""Compared if the name is unknown, so that the response takes as long as for a wrong secret."""


class Access(Enum):
    """The credentials that a route requires."""

    OPEN = "nothing"
    KEY = "a key"
    UPLOAD = "a key or an upload token"


_OPEN = frozenset({"/", "/.well-known/jwks.json", "/health", "/openapi.json", "/v1/meta"})
"""Routes that are readable without a key; they contain no data of requests."""
_READS = frozenset({"GET", "HEAD"})


def access_of(method: str, template: str) -> Access:
    """Return the credentials that a route requires, by its template. The default is a key.

    Files are public, as on fal, because their names cannot be guessed; the path of an announced upload contains a
    token; browsers send preflight requests (OPTIONS) without a key.
    """
    if method == "OPTIONS" or template.startswith("/storage/upload/{"):
        return Access.OPEN
    if method in _READS and (template in _OPEN or template.startswith(("/files/", "/static/"))):
        return Access.OPEN
    return Access.UPLOAD if template.startswith("/files/") else Access.KEY


class Denied(Exception):
    """The call is not authorised.

    Args:
        status: 401 or 403.
        detail: the message, in fal's words.
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
    """Reason why the owner is locked; None: not locked."""

    @property
    def line(self) -> str:
        """The key's line in a keys file."""
        return ":".join([self.name, self.digest.hex(), *([self.locked] if self.locked is not None else [])])


class Keys:
    """The valid keys. Without any, the server requires no key and listens on loopback only."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._of: dict[str, list[Key]] = {}
        for key in keys:
            self._of.setdefault(key.name, []).append(key)

    def __bool__(self) -> bool:
        return bool(self._of)

    def __repr__(self) -> str:
        return f"Keys({sorted(self._of)})"

    def check(self, credentials: str) -> str:
        """Return the owner of a key `name:secret`, compared in constant time.

        Raises:
            Denied: 401 for an unknown or malformed key, 403 for a locked owner.
        """
        name, colon, secret = credentials.strip().partition(":")
        if not colon or not name or not secret:
            raise Denied(401, "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'.")
        digest, found = hashlib.sha256(_sent(secret)).digest(), None
        keys = self._of.get(name, [])
        for key in keys or [Key("", _NO_KEY)]:
            if hmac.compare_digest(key.digest, digest) and keys:
                found = key
        if found is None:
            raise Denied(401, "No user found for Key ID and Secret")
        return _unlocked(found)

    def owner(self, name: str) -> str:
        """Check that the owner of a token still has a valid key.

        Raises:
            Denied: all keys of the owner are removed or locked.
        """
        keys = self._of.get(name, [])
        if not keys:
            raise Denied(401, "No user found for Key ID and Secret")
        return _unlocked(next((key for key in keys if key.locked is None), keys[0]))


class Token(NamedTuple):
    """A token that replaces a key for uploads."""

    text: str
    expires_at: float


class Authenticator:
    """Authenticates calls.

    Args:
        keys: the valid keys.
        secret: signs tokens; constant per data dir, so that tokens survive a restart.
        app_id: the served endpoint, for messages.
        clock: Unix seconds.
    """

    def __init__(self, keys: Keys, secret: bytes, app_id: str, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._secret = secret
        self._app_id = app_id
        self._clock = clock

    @property
    def keyed(self) -> bool:
        """Whether the server has keys."""
        return bool(self._keys)

    def owner(self, authorization: str | None, access: Access) -> str:
        """Return the owner of a call; empty on a server without keys and for public routes.

        Args:
            authorization: the header, if any; repeated headers joined by ", ", which never form a valid key.
            access: the credentials that the route requires.

        Raises:
            Denied: missing, invalid or locked credentials.
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
        """Return a signed upload token for an owner, valid for one day. The server does not store it."""
        expires_at = self._clock() + TOKEN_SECONDS
        stem = f"{owner}.{int(expires_at)}"
        return Token(f"{stem}.{self._sign(stem)}", expires_at)

    def _name_in(self, token: str) -> str:
        stem, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._sign(stem).encode(), _sent(signature)):
            raise Denied(401, "The token is invalid; request a new one")
        name, _, expires_at = stem.rpartition(".")
        if int(expires_at) < self._clock():
            raise Denied(401, "The token has expired; request a new one")
        return name

    def _sign(self, stem: str) -> str:
        return hmac.new(self._secret, _sent(stem), hashlib.sha256).hexdigest()


def _sent(text: str) -> bytes:
    """Return the bytes of a header as sent: bytes that are not UTF-8 arrive as lone surrogates."""
    return text.encode("utf-8", "surrogateescape")


def load_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Load the keys of a file and of `FAL_SERVER_KEYS`.

    Args:
        path: a file of lines `name:sha256`, or `name:sha256:reason` for a locked owner; empty lines and lines that
            begin with # are ignored. None: no file.
        environment: the process environment.

    Raises:
        ConfigError: the file is unreadable or contains no key, or a line is invalid. The message contains no secret.
    """
    keys = [_read(text, ENVIRONMENT) for text in re.split(r"[\s,]+", environment.get(ENVIRONMENT, "")) if text]
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the keys file {path}: {error}; create it: `restyle serve --keys {path} --new-key NAME`"
            ) from error
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        found = [_read(line, f"{path}, line {number}") for number, line in numbered if line and line[0] != "#"]
        if not found:
            raise ConfigError(f"{path} contains no key; add one: `restyle serve --keys {path} --new-key NAME`")
        keys += found
    return Keys(tuple(keys))


def add_key(path: Path, name: str, secret: str) -> str:
    """Append a key to the file and return it as `name:secret`. A new file has mode 0600.

    Args:
        path: the keys file.
        name: the owner's name, which appears in webhooks and in the server's log.
        secret: at least 256 random bits, without colons or white space.

    Raises:
        InputError: the name is invalid, or the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"invalid key name {name!r}: use up to 64 letters, digits, dots, dashes and underscores")
    key = Key(name, hashlib.sha256(secret.encode()).digest())
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:  # noqa: PTH123 - mode set
            file.seek(0)
            separator = "" if file.read()[-1:] in {b"", b"\n"} else "\n"
            file.write(f"{separator}{key.line}\n".encode())
        sync(path)
    except OSError as error:
        raise InputError(f"cannot write the keys file {path}: {error}; choose another with --keys") from error
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
            f"{where} is not a key: expected name:sha256, as written by `restyle serve --keys FILE --new-key NAME`"
        )
    return Key(name, bytes.fromhex(digest), (reason.strip() or "Admin lock") if colon else None)


# Newer versions of aiohttp warn about plain strings as keys; older ones have no RequestKey.
_OWNER: Any = web.RequestKey("owner", str) if hasattr(web, "RequestKey") else "owner"


def set_owner(request: web.Request, owner: str) -> None:
    """Set the owner of a call; empty if no key was required."""
    request[_OWNER] = owner


def owner_of(request: web.Request) -> str:
    """Return the authenticated owner of a request; empty on a server without keys and for public routes."""
    owner: str = request.get(_OWNER, "")
    return owner
