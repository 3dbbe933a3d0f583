"""Splitting a JSON list into its objects: arbitrary contents, chunk boundaries, and malformed lists."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.manifest.formats.json_items import BadJson, NotRows, split


def items(text: bytes, chunk: int = 2**20) -> list[tuple[int, object]]:
    """Return lines and values, read in chunks of `chunk` bytes."""
    stream = io.BytesIO(text)
    found = list(split(lambda: stream.read(chunk)))
    assert all(b"\n" not in item.text for item in found)
    return [(item.line, json.loads(item.text)) for item in found]


def nested(depth: int) -> str:
    return '{"a":[' * depth + '"]}\\"{["' + "]}" * depth


def test_each_object_has_the_line_on_which_it_starts():
    text = b'\xef\xbb\xbf \n[\n {"a":\n 1},\r\n\n{"b":2} ,{"c":\n"x"}\n]\n'
    assert items(text) == [(3, {"a": 1}), (6, {"b": 2}), (6, {"c": "x"})]


@pytest.mark.parametrize("depth", [0, 1, 3, 4, 5, 40])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_brackets_and_quotes_inside_an_object_are_its_own(depth, chunk):
    """Also beyond the depth of the fast regex."""
    text = f'[{{"n":{nested(depth) if depth else 1}}},{{"m":"]}}"}}]'.encode()
    assert [value for _, value in items(text, chunk)] == json.loads(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[],:\n\u00e9\U0001f600', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), max_size=5)


@settings(deadline=None, max_examples=150)
@given(RECORDS, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_any_list_comes_apart_as_it_was_written(records, indent, ascii_only, chunk):
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()
    assert [value for _, value in items(text, chunk)] == records


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES, min_size=1), min_size=2, max_size=4), st.integers(1, 40))
def test_objects_one_after_another_come_apart_too(records, chunk):
    """This is the output format of `jq '.[]'`."""
    text = "\n".join(json.dumps(record, indent=1) for record in records).encode()
    assert [value for _, value in items(text, chunk)] == records


WRONG = [
    # text, line, row, words
    (b"[", 1, 0, ["is not closed", "complete"]),
    (b'[{"a":1}', 1, 1, ["after an object", "comma"]),
    (b'[{"a":1},', 1, 1, ["is not closed"]),
    (b'[{"a":1},]', 1, 1, ["comma before the end"]),
    (b'[{"a":1} {"a":2}]', 1, 1, ["after an object", "comma"]),
    (b'[{"a":1}}]', 1, 1, ["'}' after an object"]),
    (b'[{"a":1}]\n[{"a":2}]', 2, 1, ["after the end of the list"]),
    (b'[,{"a":1}]', 1, 0, ["',' is not a JSON object"]),
    (b'[{"a":1},\n 7]', 2, 1, ["'7' is not a JSON object"]),
    (b'[{"a":1},"x",{}]', 1, 1, ["""'"x"' is not a JSON object"""]),
    (b'[{"a":1},null]', 1, 1, ["'null' is not a JSON object"]),
    (b"[[1]]", 1, 0, ["'[1' is not a JSON object"]),
    (b'[\n{"a":1},\n{"a":"x\n"}]', 3, 1, ["line break", "string"]),
    (b'[{"a":"\t"}]', 1, 0, ["control character"]),
    (b'[\n{"a":1},\n{"a":2,\n{"a":3}]', 4, 1, ["']' does not match the open bracket"]),
    (b'[{"a":[1}]', 1, 0, ["'}' does not match the open bracket"]),
    (b'[\n{"a":1},\n{"a" 2}, {"a"', 3, 2, ["that begins here is not closed"]),
    (b'[\n{"a":1},\n{"a" 2, "b":', 3, 1, ["not parseable as JSON"]),
    (b'[\n{"a":1},\n{"a":2', 3, 1, ["that begins here is not closed"]),
    (b'[\n{"a":"', 2, 0, ["that begins here is not closed"]),
    (b'[\n{"a":"\\', 2, 0, ["that begins here is not closed"]),
    (b'"text"', 1, 0, ["begins with", "a list of objects"]),
    (b"image_url,prompt\n", 1, 0, ["begins with", "image_url"]),
    (b'{"a":1}\n{"a":', 2, 1, ["that begins here is not closed"]),
    (b'{"a":1},{"a":2}', 1, 1, ["',' is not a JSON object"]),
]


@pytest.mark.parametrize(("text", "line", "row", "words"), WRONG, ids=[repr(row[0]) for row in WRONG])
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_what_is_not_a_list_of_objects_is_said_with_its_place(text, line, row, words, chunk):
    with pytest.raises(BadJson) as raised:
        items(text, chunk)
    assert (raised.value.line, raised.value.row) == (line, row), str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_what_comes_before_a_fault_is_given_first():
    stream = io.BytesIO(b'[{"a":1},{"a":2},x')
    found = split(lambda: stream.read(5))
    assert [json.loads(next(found).text) for _ in range(2)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(BadJson):
        next(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"data": [{"a": 1}], "meta": {}}', "one object, with the keys 'data', 'meta'"),
        (b'{"a":{"0":1},"b":1,"c":1,"d":1,"e":1,"f":1}\n\n', "'a', 'b', 'c', 'd', 'e', ..."),
        (b"{}", "one object, which is empty"),
    ],
)
def test_one_object_is_not_a_list_of_rows(text, words):
    with pytest.raises(NotRows, match=words):
        items(text)


def test_an_object_that_does_not_end_is_not_read_to_the_end_of_the_file():
    """Otherwise an unclosed quote in a file of many gigabytes would take that much memory."""
    stream = io.BytesIO(b'[{"a":1},\n{"a":[' + b'{"b":1},\n' * 10_000)
    with pytest.raises(BadJson, match="the object that begins here is longer than"):
        list(split(lambda: stream.read(100), longest=1000))
    assert stream.tell() < 5000
    stream = io.BytesIO(b'{"data": [' + b'{"a":1},' * 10_000 + b'{"a":1}]}')
    with pytest.raises(NotRows, match="whose first key is 'data'"):
        list(split(lambda: stream.read(100), longest=1000))
    assert stream.tell() < 5000
