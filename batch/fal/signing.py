"""Webhook signatures, both directions: Ed25519 over four lines, keys published as a JWKS. Pure.

The message is the request id, the user id, the Unix timestamp and the lower-case hex SHA-256 of the raw body,
joined by newlines. Source: fal's webhook page, read in autumn 2026. fal publishes its keys at
`https://rest.fal.ai/.well-known/jwks.json`, our server at `/.well-known/jwks.json` of its own origin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from batch.types import Json, JsonObject

__all__ = ["LEEWAY_SECONDS", "BadSignature", "jwks_of", "keys_in", "sign", "verify"]

LEEWAY_SECONDS = 300.0
"""A timestamp further off than this is refused, in either direction."""

_REQUEST_ID = "x-fal-webhook-request-id"
_USER_ID = "x-fal-webhook-user-id"
_TIMESTAMP = "x-fal-webhook-timestamp"
_SIGNATURE = "x-fal-webhook-signature"


class BadSignature(ValueError):
    """A callback that must not be believed. The message says which check it failed."""


def sign(key: Ed25519PrivateKey, *, request_id: str, user_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The four headers of one callback; `timestamp` in whole Unix seconds.

    Raises:
        ValueError: an id with a line break in it: it could be read as another message.
    """
    if "\n" in request_id + user_id:
        raise ValueError("an id with a line break cannot be signed")
    signature = key.sign(_message(request_id, user_id, str(timestamp), body))
    return {
        _REQUEST_ID: request_id,
        _USER_ID: user_id,
        _TIMESTAMP: str(timestamp),
        _SIGNATURE: signature.hex(),
    }


def verify(headers: Mapping[str, str], body: bytes, keys: list[Ed25519PublicKey], *, now: float) -> str:
    """Check a callback against every key; the request id that it is about.

    Args:
        headers: of the callback, names in any case.
        body: as it came, before any parsing.
        keys: from `keys_in`; may be cached for a day at most.
        now: Unix seconds.

    Raises:
        BadSignature: a header is missing, no number, no hex or has a line break, the time is off, or no key fits.
    """
    given = {name.lower(): value for name, value in headers.items()}
    try:
        request_id, user_id, timestamp, signature = (
            given[name] for name in (_REQUEST_ID, _USER_ID, _TIMESTAMP, _SIGNATURE)
        )
    except KeyError as error:
        raise BadSignature(f"the header {error.args[0]} is missing") from None
    try:
        at, raw = int(timestamp), binascii.unhexlify(signature)
    except ValueError:
        raise BadSignature("the timestamp is no number, or the signature is no hex") from None
    if "\n" in request_id + user_id + timestamp:
        raise BadSignature("a header has a line break in it")
    if abs(now - at) > LEEWAY_SECONDS:
        raise BadSignature(f"the timestamp is {abs(now - at):.0f} s off, more than {LEEWAY_SECONDS:.0f} s")
    message = _message(request_id, user_id, timestamp, body)
    for key in keys:
        try:
            key.verify(raw, message)
        except InvalidSignature:
            continue
        return request_id
    raise BadSignature(f"none of {len(keys)} keys fits the signature")


def jwks_of(keys: list[Ed25519PublicKey]) -> JsonObject:
    """The key set as it is published."""
    published: list[Json] = []
    for key in keys:
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        published.append(
            {"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": hashlib.sha256(raw).hexdigest()[:16], "x": _b64(raw)}
        )
    return {"keys": published}


def keys_in(jwks: JsonObject) -> list[Ed25519PublicKey]:
    """The usable keys of a published set; what is no Ed25519 key is passed over."""
    found = []
    keys = jwks.get("keys")
    for entry in keys if isinstance(keys, list) else []:
        x = entry.get("x") if isinstance(entry, dict) else None
        if not isinstance(x, str):
            continue
        try:
            found.append(Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(x + "=" * (-len(x) % 4))))
        except ValueError:
            continue
    return found


def _message(request_id: str, user_id: str, timestamp: str, body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return f"{request_id}\n{user_id}\n{timestamp}\n{digest}".encode()


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
