"""The English of the project: plain, modern, technical. Patterns that once made it hard to read do not come back.

Checked are strings, docstrings and comments of Python files, and the whole text of pages, configs and the notebook.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PATTERNS = {
    "no X": (
        r"(?<![Tt]here )\b(?:is|are|was|were) no (?!(?:longer|more|later|earlier|less|fewer)\b)[a-z]",
        "say what it is, or 'not a'",
    ),
    "is none": (r"\b(?:is|are|was|were|that's) none\b", "say 'is missing', 'there is no X'"),
    "Of/What": (r'^(?:[rR]?""")(?:Of|What|Whose|Whoever) ', "begin with a verb or a noun"),
    "whoever": (r"\b[Ww]ho(?:so)?ever\b|\bwhosoever\b", "name the actor"),
    "anew": (r"\banew\b", "say 'again'"),
    "mend": (r"\b[Mm]end(?:s|ed|ing)?\b", "say 'fix'"),
    "to be had": (r"\bto be had\b|\bcan(?:not)? be had\b|\bcould be had\b", "say 'available'"),
    "nobody": (r"\b[Nn]obody\b|\b[Ss]omebody\b|\b[Ee]verybody\b", "name the actor"),
    "for ever": (r"\bfor ever\b", "say 'forever'"),
    "dear": (r"\bdear(?:er|est)?\b", "say 'expensive'"),
    "stands": (r"\b(?:stands?|stood) (?:in|at|for|there|here|before|between|behind|beside|twice|alone)\b",
               "say 'is', 'means', 'replaces'"),
    "so long": (r"\bso long\b|\bso many\b|\bso much\b", "give the number, or say 'as long as', 'that many'"),
    "he": (r"\b(?:[Hh]e|[Hh]im|[Hh]is)\b", "a user is 'they', a process is 'it'"),
    "tells": (r"\b(?:tells?|told)\b", "say 'reports', 'says', 'shows'"),
    "beside": (r"\b[Bb]eside\b", "say 'next to', 'besides'"),
    "half character": (
        r"\bhalf (?:a )?characters?\b|\btwins?\b|\bstrangers?\b",
        "say 'lone surrogate', 'duplicate key', 'unknown'",
    ),
    "picture": (r"[Pp]icture", "say 'image'"),
    "shall": (r"\b[Ss]hall\b", "say 'must' or 'should'"),
}  # fmt: skip
"""Name: what is looked for, and what to write."""

ALLOWED: dict[str, set[str]] = {
    "tests/unit/test_prose.py": set(PATTERNS),
    "CHANGELOG.md": set(PATTERNS),  # history is not rewritten
}
"""Names of patterns that a file may have, each with its reason."""

SUFFIXES = {".py", ".md", ".toml", ".html", ".js", ".ipynb", ".sql", ".service", ".timer"}


@cache
def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    names = listed.split("\n") if listed else [str(p.relative_to(REPOSITORY)) for p in REPOSITORY.rglob("*")]
    return [name for name in names if Path(name).suffix in SUFFIXES and (REPOSITORY / name).is_file()]


def prose(name: str) -> list[tuple[int, str]]:
    """Line numbers and texts: of Python its strings and comments, of everything else each line."""
    text = (REPOSITORY / name).read_text("utf-8")
    if not name.endswith(".py"):
        return list(enumerate(text.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    found: list[tuple[int, str]] = []
    for token in tokens:
        if token.type in kinds:
            found += [(token.start[0] + offset, line) for offset, line in enumerate(token.string.split("\n"))]
    return found


def faults(name: str) -> list[str]:
    """Each place with a pattern that the file may not have."""
    found = []
    for line, text in prose(name):
        for pattern, (expression, advice) in PATTERNS.items():
            if pattern not in ALLOWED.get(name, ()) and (match := re.search(expression, text)):
                found.append(f"{name}:{line}: {match[0]!r}: {advice}: {text.strip()[:100]}")
    return found


@pytest.mark.parametrize("name", files())
def test_a_file_is_written_in_plain_english(name):
    """No pattern of the list, but where the file is allowed to have it."""
    assert faults(name) == []


def test_the_patterns_find_what_they_look_for():
    """A pattern that matches nothing would let everything pass."""
    bad = {
        "no X": "'x' is no number", "is none": "where there is none", "Of/What": '"""Of one job."""',
        "whoever": "whoever asks", "anew": "begun anew", "mend": "mend the row", "to be had": "not to be had",
        "nobody": "nobody waits", "for ever": "for ever", "dear": "how dear", "stands": "it stands for that",
        "so long": "for so long", "he": "where he is", "tells": "it tells", "beside": "beside it",
        "half character": "half a character", "picture": "a picture", "shall": "it shall",
    }  # fmt: skip
    assert all(re.search(PATTERNS[name][0], text) for name, text in bad.items())
    assert set(bad) == set(PATTERNS)


if __name__ == "__main__":
    import sys

    chosen = sys.argv[1:]
    lines = [line for name in files() if not chosen or name.startswith(tuple(chosen)) for line in faults(name)]
    print(*lines, sep="\n")
    print(f"{len(lines)} places")
