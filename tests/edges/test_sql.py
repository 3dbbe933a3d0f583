"""Loading of named statements from `.sql` files."""

from __future__ import annotations

import sqlite3

import pytest

from batch.system.sql import load_statements
from tests.unit.test_layers import REPOSITORY


def loaded(folder, text):
    (folder / "module.sql").write_text(text)
    return load_statements(str(folder / "module.py"))


def test_statements_keep_the_order_of_the_file(tmp_path):
    """Text before the first name is ignored."""
    found = loaded(tmp_path, "-- head\n\n-- name: b_1\n-- Why.\nSELECT 1;\n\n-- name: a\nSELECT 2;\nSELECT 3;\n")
    assert dict(found) == {"b_1": "-- Why.\nSELECT 1;", "a": "SELECT 2;\nSELECT 3;"}
    assert list(found) == ["b_1", "a"]
    assert found.begin_with("b_") == ["-- Why.\nSELECT 1;"]


def test_missing_and_duplicate_names_are_errors(tmp_path):
    """The message contains the file and the name."""
    with pytest.raises(LookupError, match=r"module\.sql has no statement named 'c'"):
        loaded(tmp_path, "-- name: a\nSELECT 1;")["c"]
    with pytest.raises(ValueError, match=r"module\.sql has two statements named 'a'"):
        loaded(tmp_path, "-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "batch").rglob("*.sql")), ids=lambda path: path.name)
def test_every_sql_file_has_a_module_and_complete_statements(path):
    """The module has the same path with suffix .py; every statement ends with a semicolon."""
    assert path.with_suffix(".py").exists()
    statements = load_statements(str(path))
    assert statements
    assert [name for name, text in statements.items() if not sqlite3.complete_statement(text)] == []
