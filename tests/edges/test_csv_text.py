"""Text manifests of other programs: separators, encodings, byte order marks, and undecodable bytes."""

import bz2
import codecs
import gzip
import json
import lzma
import subprocess
import sys
from contextlib import suppress

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.config import Settings
from batch.errors import ManifestError
from batch.manifest.formats.base import Dialect
from batch.manifest.planner import dialect_of
from batch.manifest.reader import Manifest

NEEDED = dialect_of(Settings())
HEADER = ["image_url", "prompt", "strength"]
ROWS = [["a.jpg", "a cat", "0.5"], ["b.jpg", "a dog, a hat; a | and a café", "0.6"]]
SEPARATORS = [",", ";", "\t", "|"]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def rows_of(manifest: Manifest, size: int = 4096) -> list[list[str | None]]:
    return [list(row) for batch in manifest.batches(size) for row in batch.frame.rows()]


def lines_of(manifest: Manifest) -> list[int]:
    return [line for batch in manifest.batches() for line in batch.lines]


def delimited(separator: str, rows: list[list[str]], end: str = "\r\n", *, quoted: bool = False) -> str:
    """Return rows as Excel writes them: a field is quoted only if necessary."""

    def field(value: str) -> str:
        needs = quoted or any(character in value for character in (separator, '"', "\r", "\n"))
        return '"' + value.replace('"', '""') + '"' if needs else value

    return "".join(separator.join(map(field, row)) + end for row in rows)


@pytest.fixture
def write(tmp_path):
    def _write(name: str, data: bytes | str):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return _write


# --- separators ---


@pytest.mark.parametrize("quoted", [False, True], ids=["bare", "quoted"])
@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.tab"])
@pytest.mark.parametrize("separator", SEPARATORS)
def test_the_separator_is_the_one_that_the_header_shows(write, separator, name, quoted) -> None:
    """Suffix and prompts have no influence; a note reports a separator other than the format's default."""
    manifest = Manifest.open(write(name, delimited(separator, [HEADER, *ROWS], quoted=quoted)), None, NEEDED)
    assert list(manifest.columns) == HEADER
    assert rows_of(manifest) == ROWS
    shown = "tab" if separator == "\t" else repr(separator)
    usual = "," if name == "m.csv" else "\t"
    assert manifest.notes == (() if separator == usual else (f"separator {shown} (found in the header)",))


TEXTS = st.text(alphabet='a;,|\t" \n', max_size=6).filter(lambda text: text != "")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.sampled_from(SEPARATORS))
def test_text_in_the_rows_does_not_change_the_separator(tmp_path_factory, rows, separator) -> None:
    """Only the header decides."""
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    records = [list(row) for row in rows]
    path.write_bytes(delimited(separator, [["image_url", "prompt"], *records]).encode())
    assert rows_of(Manifest.open(path, None, NEEDED)) == records


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        # a quoted name that contains a separator
        ('"image_url","size; in cm",prompt', ("image_url", "size; in cm", "prompt")),
        ('image_url;"size, in cm";prompt', ("image_url", "size, in cm", "prompt")),
        ('"image_url"|"a,b;c"|"prompt"', ("image_url", "a,b;c", "prompt")),
        # an unquoted name that contains a separator
        ("image_url,prompt;de,prompt", ("image_url", "prompt;de", "prompt")),
        ("a,b,c;image_url;prompt", ("a,b,c", "image_url", "prompt")),
        # endpoint inputs decide if the mapped columns do not
        ("bild,x;strength;seed", ("bild,x", "strength", "seed")),
        # a header of two lines
        ('"image_url";"two\r\nlines";"prompt"', ("image_url", "two\r\nlines", "prompt")),
        # spaces around the names are ignored
        ("image_url ; prompt", ("image_url ", " prompt")),
        # one column, and one followed by a separator
        ("image_url", ("image_url",)),
        ("image_url;", ("image_url", "")),
    ],
)
def test_the_needed_columns_decide(write, header, columns) -> None:
    """The separator that yields most of them wins; in a tie, the format's default."""
    width = len(columns)
    rows = ["x" if width == 1 else separator.join("x" * width) for separator in ",;|"]
    found = []
    for row in rows:  # other separators give a row of another length
        with suppress(ManifestError):
            found.append(Manifest.open(write("m.csv", f"{header}\r\n{row}\r\n"), None, NEEDED).columns)
    assert set(found) == {columns}


def test_other_mapped_names_decide_too(write) -> None:
    """These are the columns of the settings, including those of templates."""
    mapped = Settings(manifest={"image": "foto", "prompt": "a {tier} in {ort}", "id": "nr"})
    manifest = Manifest.open(write("m.csv", "nr;foto,klein;tier;ort;foto\n1;2;3;4;5\n"), None, dialect_of(mapped))
    assert manifest.columns == ("nr", "foto,klein", "tier", "ort", "foto")


def test_the_header_is_split_even_without_a_needed_column(write) -> None:
    """The message about the missing column can then name the columns."""
    assert Manifest.open(write("m.csv", "bild;text\na;b\n"), None, NEEDED).columns == ("bild", "text")
    assert Manifest.open(write("n.csv", "bild,text;de\na,b\n"), None, NEEDED).columns == ("bild", "text;de")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
@pytest.mark.parametrize("line", ["sep=;", "SEP=;", '"sep=;"'])
def test_excels_first_line_sets_the_separator(write, line, mark) -> None:
    """It is not a row, but counts as a line."""
    text = f"{line}\r\n" + delimited(";", [HEADER, ["a.jpg", "two\r\nlines", "0.5"], ["b.jpg", "x", "0.6"]])
    manifest = Manifest.open(write("m.csv", mark + text.encode()), None, NEEDED)
    assert rows_of(manifest) == [["a.jpg", "two\r\nlines", "0.5"], ["b.jpg", "x", "0.6"]]
    assert lines_of(manifest) == [3, 5]
    assert manifest.notes == ("separator ';' (the line sep= at the top)",)
    broken = write("n.csv", mark + text.encode() + b"one\r\n")
    with pytest.raises(ManifestError, match=r"line 6: 1 field where the header has 3 \(separator ';'\)"):
        Manifest.open(broken, None, NEEDED)


def test_the_setting_overrides_the_header_and_the_first_line(write) -> None:
    """The setting may also be a separator that is never detected."""
    path = write("m.csv", "sep=;\nimage_url^prompt;x\na.jpg^b;c\n")
    manifest = Manifest.open(path, None, NEEDED._replace(separator="^"))
    assert manifest.columns == ("image_url", "prompt;x")
    assert rows_of(manifest) == [["a.jpg", "b;c"]]
    assert manifest.notes == ("separator '^' (manifest.separator)",)


@pytest.mark.parametrize(
    ("text", "rows", "note"),
    [
        ("image_url;prompt\na.jpg;a cat; with a hat\n", [["a.jpg", "a cat; with a hat"]], "1 row has"),
        (
            "image_url\tprompt\tid\na.jpg\ta\t b\t c\t7\n\nb.jpg\tx\t8\nc.jpg\ta\t b\t9\n",
            [["a.jpg", "a\t b\t c", "7"], ["b.jpg", "x", "8"], ["c.jpg", "a\t b", "9"]],
            "2 rows have",
        ),
    ],
)
def test_an_unquoted_separator_before_a_space_is_text(write, text, rows, note) -> None:
    """If the line then has as many fields as the header, the reading is unambiguous; a note reports it."""
    manifest = Manifest.open(write("m.csv", text), None, NEEDED)
    assert rows_of(manifest) == rows_of(manifest, 1) == rows
    assert note in manifest.notes[1]
    assert "line 2" in manifest.notes[1]


@pytest.mark.parametrize(
    "text",
    [
        "image_url;prompt\na.jpg;a cat;with a hat\n",
        "image_url;prompt\na.jpg; a cat; with a hat\n",
        "image_url;prompt\na.jpg;a; b;c\n",
        "image_url;prompt;id\na.jpg;a\n",
        "image_url,prompt\na.jpg,a cat, with a hat\n",
    ],
)
def test_an_ambiguous_line_is_refused(write, text) -> None:
    """A guess could cost money. In files with commas, quotes are usual, so an extra field is an error."""
    with pytest.raises(ManifestError, match=r"line 2: \d fields where the header has"):
        Manifest.open(write("m.csv", text), None, NEEDED)


# --- encodings ---

TABLE = delimited(";", [HEADER, *ROWS, ["c.jpg", "ein Fuß\r\nund 猫", "1"]])
LINES = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) for row in ROWS) + "\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("codec", MARKED)
@pytest.mark.parametrize(("kind", "text"), [("csv", TABLE), ("jsonl", LINES)])
def test_a_byte_order_mark_says_the_encoding(write, kind, text, codec, packing) -> None:
    """This is Excel's "Unicode text"; it works with every compression, and overrides the setting."""
    plain = Manifest.open(write(f"plain.{kind}", text), None, NEEDED)
    path = write(f"m.{kind}{packing}", PACKERS[packing](MARKED[codec] + text.encode(codec)))
    for dialect in (NEEDED, NEEDED._replace(encoding="latin-1")):
        manifest = Manifest.open(path, None, dialect)
        assert manifest.schema == plain.schema
        assert rows_of(manifest) == rows_of(plain)
        assert lines_of(manifest) == lines_of(plain)
        family = codec.upper()[:6]
        said = () if codec == "utf-8" else (f"encoding {family} (byte order mark)",)
        assert manifest.notes == (*plain.notes, *said)


@pytest.mark.parametrize("codec", ["latin-1", "cp1252", "cp850", "utf-16-le", "utf-16-be", "mac-roman", "utf-8"])
@pytest.mark.parametrize(("kind", "text"), [("csv", TABLE.replace("猫", "x")), ("jsonl", LINES)])
def test_the_setting_selects_any_other_encoding(write, kind, text, codec) -> None:
    """Encodings of one or more bytes per character are decoded correctly."""
    plain = Manifest.open(write(f"plain.{kind}", text), None, NEEDED)
    manifest = Manifest.open(write(f"m.{kind}", text.encode(codec)), None, NEEDED._replace(encoding=codec))
    assert rows_of(manifest) == rows_of(plain)
    assert any("encoding" in note for note in manifest.notes) == (codec != "utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_multibyte_characters_across_chunks_are_decoded(write, kind) -> None:
    """The texts are longer than the chunks in which files are read."""
    prompts = ["猫" * count + "é" for count in (1, 70_000, 65_535)]
    text = "image_url,prompt\n" + "".join(f"a.jpg,{prompt}\n" for prompt in prompts)
    if kind == "jsonl":
        text = "".join(json.dumps({"image_url": "a.jpg", "prompt": p}, ensure_ascii=False) + "\n" for p in prompts)
    for codec in ("utf-16", "utf-32", "utf-8-sig", "gb18030"):
        manifest = Manifest.open(write(f"m.{kind}", text.encode(codec)), None, Dialect(encoding="gb18030"))
        assert [row[1] for row in rows_of(manifest)] == prompts, codec


@pytest.mark.parametrize(
    ("name", "data", "encoding", "words"),
    [
        ("m.csv", b"a,b\r\n1,2\r\n1,caf\xe9\r\n", None, ["m.csv, line 3: byte 0xe9 at offset 15 is not UTF-8"]),
        ("m.csv", b"a,b\n1,caf\xe9", None, ["line 2: byte 0xe9 at offset 9 is not UTF-8", 'for example "cp1252"']),
        ("m.csv", b"a,b\n1,\xff\xfe\n", None, ["line 2: byte 0xff at offset 6"]),
        ("m.jsonl", b'{"a":1}\n\n{"a":"\xe4"}\n', None, ["line 3: byte 0xe4 at offset 15", "save it as UTF-8"]),
        ("m.csv", b"a,b\n" + b"1,2\n" * 40_000 + b"1,\xe9\n", None, ["line 40002: byte 0xe9 at offset 160006"]),
        ("m.csv", b"\xff\xfe" + "a,b\n1,2\n3,4".encode("utf-16-le")[:-1], None, ["line 3", "UTF-16", "complete"]),
        ("m.csv", b"\xff\xfe" + "a,b\n1,".encode("utf-16-le") + b"\x3d\xd8\x0a\x00", None, ["line 2", "offset 14"]),
        ("m.jsonl", b"\xfe\xff" + '{"a":1}\n{"a"'.encode("utf-16-be")[:-1], None, ["line 2", "UTF-16"]),
        ("m.csv", b"a,b\n1,\x81\n", "cp1252", ["line 2: byte 0x81 at offset 6 is not cp1252 (manifest.encoding)"]),
        ("m.csv", b"a,b\n1,\xc3\xa9\n", "ascii", ["line 2: byte 0xc3 at offset 6 is not ascii", "manifest.encoding"]),
        ("m.csv", "a,b\n1,2\n".encode("utf-16-le"), None, ["NUL", 'set manifest.encoding = "utf-16-le"']),
        ("m.csv", "a,b\n1,2\n".encode("utf-16-be"), None, ["NUL", 'set manifest.encoding = "utf-16-be"']),
        ("m.jsonl", '{"a":1}\n'.encode("utf-16-le"), None, ["line 1", 'set manifest.encoding = "utf-16-le"']),
        ("m.csv", b"\xff\xfe", None, ["m.csv is empty"]),
        ("m.csv", b"\xef\xbb\xbf", None, ["m.csv is empty"]),
        ("m.csv", b"sep=;\r\n", None, ["m.csv is empty"]),
        ("m.jsonl", b"\xff\xfe\x00\x00", None, ["m.jsonl is empty"]),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_the_message_about_undecodable_bytes_names_line_and_byte(write, name, data, encoding, words, packing) -> None:
    """The message has the fix. Opening raises it, before anything is planned."""
    path = write(name + packing, PACKERS[packing](data))
    with pytest.raises(ManifestError) as raised:
        Manifest.open(path, None, Dialect(encoding=encoding))
    for word in words:
        assert word.replace("m.csv", f"m.csv{packing}").replace("m.jsonl", f"m.jsonl{packing}") in str(raised.value)


def test_a_decoding_error_in_a_later_pass_is_explained(write) -> None:
    """The file has changed since it was opened."""
    path = write("m.csv", b"a,b\n1,2\n")
    manifest = Manifest.open(path)
    path.write_bytes(b"a,b\n1,\xe9\n")
    with pytest.raises(ManifestError, match="line 2: byte 0xe9"):
        list(manifest.batches())


MEASURE = """
import resource, sys
from batch.manifest.formats.base import Dialect
from batch.manifest.reader import Manifest
for source in sys.argv[1:3]:
    rows = sum(len(batch.frame) for batch in Manifest.open(source, None, Dialect(encoding="latin-1")).batches())
    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize(("kind", "codec"), [("csv", "utf-16"), ("jsonl", "utf-16"), ("jsonl", "latin-1")])
def test_memory_does_not_grow_with_a_manifest_of_another_encoding(tmp_path, kind, codec) -> None:
    """Text is decoded in chunks, also from a compressed file."""
    for name, count in (("small", 2_000), ("large", 100_000)):
        prompt = "é" * 150
        rows = (f"https://a.example/{i},{prompt}\n" for i in range(count))
        if kind == "jsonl":
            rows = (f'{{"image_url":"https://a.example/{i}","prompt":"{prompt}"}}\n' for i in range(count))
        text = ("image_url,prompt\n" if kind == "csv" else "") + "".join(rows)
        (tmp_path / f"{name}.{kind}.gz").write_bytes(gzip.compress(text.encode(codec), 1))
    sources = [str(tmp_path / f"{name}.{kind}.gz") for name in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *sources], capture_output=True, text=True, check=True)
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (small, large) == (2_000, 100_000)
    assert after - before < 50
