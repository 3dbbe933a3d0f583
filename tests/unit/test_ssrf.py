"""The SSRF rules for URLs and addresses, without network access."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.server.egress.ssrf import AddressRefused, address_rule, check_url, literal_address, private_too, public_only

PUBLIC = ["8.8.8.8", "1.1.1.1", "172.15.255.255", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"]
CLOSED = [  # refused by the strict rule only
    *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1"),
    *("::1", "fd00::1", "fc00::1"),
]
NEVER = [
    *("0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.255"),
    *("240.0.0.1", "255.255.255.255", "::", "fe80::1", "fec0::1", "ff02::1", "ff0e::1", "fd00:ec2::254"),
    *("fd20:ce::254", "2001::1", "2001:db8::1", "2001:20::1", "3fff::1", "5f00::1", "64:ff9b:1::1", "100::1"),
    *("::7f00:1", "::8.8.8.8"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_permitted(text):
    """Both rules permit them."""
    address = ipaddress.ip_address(text)
    assert public_only(address)
    assert private_too(address)


@pytest.mark.parametrize("text", CLOSED)
def test_private_addresses_require_allow_private(text):
    """Loopback, private, unique local and carrier-grade NAT ranges require `--allow-private`."""
    address = ipaddress.ip_address(text)
    assert not public_only(address)
    assert private_too(address)


@pytest.mark.parametrize("text", NEVER)
def test_some_addresses_are_never_permitted(text):
    """Metadata services, link-local, multicast, reserved and documentation ranges are always refused."""
    address = ipaddress.ip_address(text)
    assert not public_only(address)
    assert not private_too(address)


@pytest.mark.parametrize("inside", [text for text in (*PUBLIC, *CLOSED, *NEVER) if ":" not in text])
@pytest.mark.parametrize("shape", ["::ffff:{}", "64:ff9b::{}", "2002:{}::1"], ids=["mapped", "NAT64", "6to4"])
def test_an_embedded_ipv4_address_is_checked(inside, shape):
    """Each of the three embeddings gives the same result."""
    number = int(ipaddress.IPv4Address(inside))
    text = f"{number >> 16:x}:{number & 0xFFFF:x}" if shape.startswith("2002") else inside
    outer, inner = ipaddress.ip_address(shape.format(text)), ipaddress.ip_address(inside)
    assert public_only(outer) == public_only(inner)
    assert private_too(outer) == private_too(inner)


@given(st.ip_addresses())
def test_the_strict_rule_permits_no_more_than_the_library(address):
    """Addresses that `ipaddress` calls private, loopback, link-local, multicast or unspecified are refused."""
    special = ("is_private", "is_loopback", "is_link_local", "is_multicast", "is_unspecified", "is_reserved")
    inside = address.version == 6 and (address.ipv4_mapped or address.sixtofour)
    if not inside and address not in ipaddress.ip_network("64:ff9b::/96") and any(getattr(address, s) for s in special):
        assert not public_only(address)


@given(st.ip_addresses())
def test_the_wide_rule_contains_the_strict_one(address):
    """`--allow-private` permits everything that the strict rule permits."""
    assert private_too(address) or not public_only(address)


def test_allow_private_chooses_the_rule():
    """The strict rule is the default."""
    assert address_rule(allow_private=False) is public_only
    assert address_rule(allow_private=True) is private_too


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1"),
        *(
            "%31%32%37.0.0.1",
            "\uff11\uff12\uff17.0.0.1",
            "①②⑦.0.0.1",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
        ),
        *("[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "[::1%25lo]", "0", "0.0.0.0"),
        *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "[::]", "10.1", "192.168.257"),
    ],
)
def test_no_spelling_of_an_address_bypasses_the_rule(host):
    """Decimal, hexadecimal, octal, short, embedded, full-width and percent-encoded spellings are all recognised."""
    with pytest.raises(AddressRefused):
        check_url(f"http://{host}/a.png", public_only)


@pytest.mark.parametrize(
    ("host", "spelled"),
    [("0x08080808", "8.8.8.8"), ("134744072", "8.8.8.8"), ("8.8.2056", "8.8.8.8"), ("[2606:4700::0:1111]", "")],
)
def test_an_old_spelling_is_normalised(host, spelled):
    """So that no later parser reads a different address."""
    assert check_url(f"https://{host}:8443/a?b=c", public_only).host == (spelled or "2606:4700::1111")


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://example.com/a", "file:///etc/passwd", "gopher://example.com/", "javascript:1", "//example.com/a"),
        *("/a.png", "a.png", "", "http://", "http:///a", "http://[", "http://exa mple.com/", "http://a\\@b/"),
        *("http://user@example.com/", "http://user:secret@example.com/", "http://:secret@example.com/"),
        *("http://example.com:0/", "http://example.com:22/", "http://example.com:25/", "http://example.com:6000/"),
        *("http://example.com:99999/", "http://example.com:x/", "http://" + "a" * 254 + "/"),
        *("http://" + "a" * 9000, "http://exa<mple.com/"),
    ],
)
def test_an_unusual_url_is_refused(url):
    """Scheme, credentials, port and host are refused with `AddressRefused`, never another error."""
    with pytest.raises(AddressRefused) as caught:
        check_url(url, private_too)
    assert str(caught.value)
    assert "secret" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize("port", [80, 443, 1024, 8080, 8443, 65535])
def test_ports_of_web_servers_are_permitted(port):
    """80, 443 and unblocked ports above 1023 are permitted."""
    assert check_url(f"http://example.com:{port}/", public_only).port == port


@given(st.text(max_size=60))
def test_no_text_breaks_the_check(text):
    """Any text gives a URL or an `AddressRefused`."""
    for url in (text, f"http://{text}", f"http://{text}/", f"http://example.com{text}"):
        try:
            target = check_url(url, public_only)
        except AddressRefused:
            continue
        assert target.scheme in {"http", "https"}
        literal = literal_address(target.raw_host)
        assert literal is None or public_only(literal)
