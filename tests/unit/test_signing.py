"""Webhook signatures in both directions, and against an independent implementation of the recipe."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from batch.fal.signing import LEEWAY_SECONDS, BadSignature, jwks_of, keys_in, sign, verify

NOW = 1_790_000_000
BODY = b'{"request_id":"r1","status":"OK","payload":{"seed":196619188014358660}}'
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
SIGNED = sign(KEY, request_id="r1", user_id="alice", timestamp=NOW, body=BODY)


def check(headers=SIGNED, body=BODY, keys=(KEY,), now=NOW):
    return verify(headers, body, [key.public_key() for key in keys], now=now)


def test_a_signature_is_what_the_page_says():
    """Ed25519 over request id, user id, timestamp and hex SHA-256 of the body, joined by line breaks; hex."""
    message = "\n".join(["r1", "alice", str(NOW), hashlib.sha256(BODY).hexdigest()]).encode()
    assert {
        "x-fal-webhook-request-id": "r1",
        "x-fal-webhook-user-id": "alice",
        "x-fal-webhook-timestamp": str(NOW),
        "x-fal-webhook-signature": KEY.sign(message).hex(),
    } == SIGNED


def test_our_verifier_believes_what_the_recipe_signs():
    """The other direction: an independent signer and our verifier; header names in any case."""
    message = f"r1\nuser|2\n{NOW}\n{hashlib.sha256(b'x').hexdigest()}".encode()
    headers = {
        "X-Fal-Webhook-Request-Id": "r1",
        "X-FAL-WEBHOOK-USER-ID": "user|2",
        "X-Fal-Webhook-Timestamp": str(NOW),
        "x-fal-webhook-signature": OTHER.sign(message).hex().upper(),
    }
    assert check(headers, b"x", keys=(KEY, OTHER)) == "r1"


LINE = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=40)


@given(LINE, LINE, st.integers(0, 2**40), st.binary(max_size=200))
def test_what_is_signed_is_believed(request_id, user_id, timestamp, body):
    """For any values."""
    headers = sign(KEY, request_id=request_id, user_id=user_id, timestamp=timestamp, body=body)
    assert verify(headers, body, [KEY.public_key()], now=timestamp) == request_id


@pytest.mark.parametrize("name", sorted(SIGNED))
def test_a_missing_header_is_named(name):
    """All four are required."""
    with pytest.raises(BadSignature, match=name):
        check({other: value for other, value in SIGNED.items() if other != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-fal-webhook-request-id", "r2"),
        ("x-fal-webhook-user-id", "bob"),
        ("x-fal-webhook-timestamp", str(NOW + 1)),
        ("x-fal-webhook-timestamp", f"0{NOW}"),
        ("x-fal-webhook-timestamp", f" {NOW}"),
        ("x-fal-webhook-timestamp", "soon"),
        ("x-fal-webhook-timestamp", ""),
        ("x-fal-webhook-signature", "no hex"),
        ("x-fal-webhook-signature", ""),
        ("x-fal-webhook-signature", "00" * 64),
        ("x-fal-webhook-signature", SIGNED["x-fal-webhook-signature"][:-2]),
        ("x-fal-webhook-signature", "ä"),
    ],
)
def test_a_tampered_header_is_refused(name, value):
    """`BadSignature`, never another exception: the input is untrusted."""
    with pytest.raises(BadSignature):
        check(SIGNED | {name: value})


@given(st.binary(max_size=100))
def test_a_tampered_body_is_refused(body):
    """Down to the last byte."""
    with pytest.raises(BadSignature):
        check(body=body)


def test_another_key_is_refused():
    """And an empty key set verifies nothing."""
    for keys in ((OTHER,), ()):
        with pytest.raises(BadSignature, match="none of"):
            check(keys=keys)


def test_parts_cannot_be_moved_across_the_lines():
    """A line break inside a value cannot make one message look like another."""
    for request_id, user_id in (("r1\nalice", ""), ("", "r1\nalice")):
        with pytest.raises(BadSignature, match="line break"):
            check(SIGNED | {"x-fal-webhook-request-id": request_id, "x-fal-webhook-user-id": user_id})
        with pytest.raises(ValueError, match="line break"):
            sign(KEY, request_id=request_id, user_id=user_id, timestamp=NOW, body=BODY)


@pytest.mark.parametrize(("off", "believed"), [(0, True), (LEEWAY_SECONDS, True), (LEEWAY_SECONDS + 1, False)])
def test_an_old_or_early_callback_is_refused(off, believed):
    """Five minutes in either direction, against replays."""
    for now in (NOW + off, NOW - off):
        if believed:
            assert check(now=now) == "r1"
        else:
            with pytest.raises(BadSignature, match="off"):
                check(now=now)


def test_keys_are_published_and_read_as_a_key_set():
    """Round trip; the `x` of each is the raw key, base64url without padding."""
    published = jwks_of([KEY.public_key(), OTHER.public_key()])
    assert [set(entry) for entry in published["keys"]] == [{"kty", "crv", "use", "kid", "x"}] * 2
    raw = base64.urlsafe_b64decode(published["keys"][0]["x"] + "=")
    assert Ed25519PublicKey.from_public_bytes(raw) == KEY.public_key()
    assert keys_in(published) == [KEY.public_key(), OTHER.public_key()]
    assert len({entry["kid"] for entry in published["keys"]}) == 2


@pytest.mark.parametrize(
    "jwks",
    [
        {},
        {"keys": None},
        {"keys": [None, 1, "x", {}, {"x": 1}, {"x": "AAAA"}, {"x": "!!!"}, {"x": "ä"}]},
    ],
)
def test_what_is_no_key_is_passed_over(jwks):
    """A foreign key set may contain anything."""
    assert keys_in(jwks) == []
