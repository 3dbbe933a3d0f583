"""How far the tests reach into private parts: `python -m tests.benchmarks.reach [--where]`.

It prints two counts for each file under tests/ and in all:

- private: uses of a name with one leading underscore that is no name of the test's own. `x._name` counts unless x is
  `self` or `cls`, or the same file defines `_name`; `from batch.x import _name` counts.
- replaced: calls of `monkeypatch.setattr` (and assignments) that put a value of the test's own into a module or a class
  of `batch`, and `setattr` on an object that the test made from one.

`--where` prints the line of each.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
