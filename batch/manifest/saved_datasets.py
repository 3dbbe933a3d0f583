"""Find the Arrow files of a Hugging Face dataset that `save_to_disk` wrote. Edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from batch.errors import ManifestError

__all__ = ["saved_files"]

_INDICES = ("_indices_files", "_indices_data_files")
"""Keys of separately saved row indices (a selection or shuffle), written by datasets before 2.0."""


def saved_files(folder: Path) -> tuple[Path, ...] | None:
    """Return the Arrow files of a saved dataset in order; None if the folder is not one.

    Raises:
        ManifestError: the folder has several splits, a row index, or missing or unreadable files.
    """
    state = folder / "state.json"
    if not state.is_file():
        splits = folder / "dataset_dict.json"
        if splits.is_file():
            raise ManifestError(_several(folder, _read(splits).get("splits")))
        return None
    facts = _read(state)
    files = facts.get("_data_files")
    if not isinstance(files, list):
        if (folder / "dataset_info.json").is_file():
            raise ManifestError(f"{state} does not list the files of the dataset (_data_files); save it again")
        return None
    if any(facts.get(key) for key in _INDICES):
        advice = "save it again with load_from_disk(...).flatten_indices().save_to_disk(...)"
        raise ManifestError(f"{folder} holds a dataset with an index over its rows, which is not supported; {advice}")
    paths = tuple(folder / name for name in map(_name, files) if name)
    if not paths or len(paths) < len(files):
        raise ManifestError(f"{state} lists no Arrow files (_data_files); give a dataset with at least one row")
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ManifestError(f"{missing} is missing, but {state.name} lists it; is the copy of the dataset complete?")
    return paths


def _several(folder: Path, splits: Any) -> str:
    names = [str(name) for name in splits] if isinstance(splits, list) else []
    said = f"the splits {', '.join(names)}" if len(names) != 1 else f"the split {names[0]}"
    example = folder / (names[0] if names else "train")
    return f"{folder} is a saved DatasetDict with {said}; name one split, for example {example}"


def _name(file: Any) -> str:
    name = file.get("filename") if isinstance(file, dict) else None
    return name if isinstance(name, str) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); is the copy of the dataset complete?") from error
    return value if isinstance(value, dict) else {}
