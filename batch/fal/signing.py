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
"""Maximum difference of a timestamp, in either direction."""

_REQUEST_ID = "x-fal-webhook-request-id"
_USER_ID = "x-fal-webhook-user-id"
_TIMESTAMP = "x-fal-webhook-timestamp"
_SIGNATURE = "x-fal-webhook-signature"


class BadSignature(ValueError):
    """A callback that must not be trusted. The message names the failed check."""


def sign(key: Ed25519PrivateKey, *, request_id: str, user_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the four headers of one callback; `timestamp` in whole Unix seconds.

    Raises:
        ValueError: an id contains a line break, so the signature could be read as one of another message.
    """
    if "\n" in request_id + user_id:
        raise ValueError("cannot sign an id that contains a line break")
    signature = key.sign(_message(request_id, user_id, str(timestamp), body))
    return {
        _REQUEST_ID: request_id,
        _USER_ID: user_id,
        _TIMESTAMP: str(timestamp),
        _SIGNATURE: signature.hex(),
    }


def verify(headers: Mapping[str, str], body: bytes, keys: list[Ed25519PublicKey], *, now: float) -> str:
    """Check a callback against every key. Return its request id.

    Args:
        headers: of the callback, names in any case.
        body: the raw bytes, before any parsing.
        keys: from `keys_in`; may be cached for at most a day.
        now: Unix seconds.

    Raises:
        BadSignature: a header is missing, invalid or contains a line break; the time is off; or no key matches.
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
        raise BadSignature("invalid timestamp, or the signature is not hexadecimal") from None
    if "\n" in request_id + user_id + timestamp:
        raise BadSignature("a header contains a line break")
    if abs(now - at) > LEEWAY_SECONDS:
        raise BadSignature(f"the timestamp is {abs(now - at):.0f} s off, more than {LEEWAY_SECONDS:.0f} s")
    message = _message(request_id, user_id, timestamp, body)
    for key in keys:
        try:
            key.verify(raw, message)
        except InvalidSignature:
            continue
        return request_id
    raise BadSignature(f"the signature matches none of {len(keys)} keys")


def jwks_of(keys: list[Ed25519PublicKey]) -> JsonObject:
    """Return the key set in its published form."""
    published: list[Json] = []
    for key in keys:
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        published.append(
            {"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": hashlib.sha256(raw).hexdigest()[:16], "x": _b64(raw)}
        )
    return {"keys": published}


def keys_in(jwks: JsonObject) -> list[Ed25519PublicKey]:
    """Return the Ed25519 keys of a published set; other keys are ignored."""
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
