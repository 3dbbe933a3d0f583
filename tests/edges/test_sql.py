"""Named statements of a `.sql` file."""

from __future__ import annotations

import sqlite3

import pytest

from batch.system.sql import load_statements
from tests.unit.test_layers import REPOSITORY


def loaded(folder, text):
    (folder / "module.sql").write_text(text)
    return load_statements(str(folder / "module.py"))


def test_statements_have_the_order_of_the_file(tmp_path):
    """What stands before the first name belongs to none."""
    found = loaded(tmp_path, "-- head\n\n-- name: b_1\n-- Why.\nSELECT 1;\n\n-- name: a\nSELECT 2;\nSELECT 3;\n")
    assert dict(found) == {"b_1": "-- Why.\nSELECT 1;", "a": "SELECT 2;\nSELECT 3;"}
    assert list(found) == ["b_1", "a"]
    assert found.begin_with("b_") == ["-- Why.\nSELECT 1;"]


def test_a_wrong_name_is_told_with_its_file(tmp_path):
    """One that is missing, and one that is there twice."""
    with pytest.raises(LookupError, match=r"module\.sql has no statement named 'c'"):
        loaded(tmp_path, "-- name: a\nSELECT 1;")["c"]
    with pytest.raises(ValueError, match=r"module\.sql has two statements named 'a'"):
        loaded(tmp_path, "-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "batch").rglob("*.sql")), ids=lambda path: path.name)
def test_every_file_has_the_one_format(path):
    """Its module is beside it, and every statement ends with a semicolon."""
    assert path.with_suffix(".py").exists()
    statements = load_statements(str(path))
    assert statements
    assert [name for name, text in statements.items() if not sqlite3.complete_statement(text)] == []
