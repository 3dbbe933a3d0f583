"""Every case that failed in use has a test, and the list of these tests is correct."""

from __future__ import annotations

import ast

import pytest

from tests.acceptance.command import REPOSITORY
from tests.cases import CASES, node_ids


def test_there_are_twenty_eight_cases():
    assert sorted(CASES) == list(range(1, 29))


@pytest.mark.parametrize("node", node_ids())
def test_a_case_names_a_test_that_exists(node):
    path, _, name = node.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text("utf-8"))
    assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
