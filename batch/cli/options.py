"""The flags that set settings, the same for `plan` and `run`.

A flag that is not given is None, so that the environment and the config file apply.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

__all__ = ["DISPLAY", "JOBS", "LIMITS", "PLACES", "JobFlags"]

JOBS = Group("What to do", sort_key=1)
LIMITS = Group("Limits", sort_key=2)
DISPLAY = Group("Display", sort_key=3)

PLACES = {
    "target": ("target", "name"),
    "engine": ("target", "engine"),
    "service_time": ("target", "service_time"),
    "slots": ("target", "slots"),
    "faults": ("target", "faults"),
    "max_in_flight": ("limits", "max_in_flight"),
    "rate": ("limits", "submits_per_second"),
    "updates": ("limits", "updates"),
    "budget": ("limits", "budget_usd"),
    "deadline": ("limits", "deadline"),
    "max_failures": ("limits", "max_failures"),
    "limit": ("limits", "rows"),
    "download": ("output", "download"),
    "on_bad_row": ("manifest", "on_bad_row"),
    "format": ("manifest", "format"),
    "prompt": ("input", "prompt"),
}
"""Section and key of each flag in the configuration."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class JobFlags:
    """The flags of `plan` and `run` that set a setting."""

    prompt: Annotated[str | None, Parameter(help="prompt of rows that have none; may use {columns}", group=JOBS)] = None
    format: Annotated[
        Literal["csv", "tsv", "jsonl", "json", "parquet", "arrow", "images"] | None,
        Parameter(help="manifest format; default: by file name, CSV for standard input", group=JOBS),
    ] = None
    target: Annotated[str | None, Parameter(help="local (default, free), fal, or a URL", group=JOBS)] = None
    engine: Annotated[
        Literal["preview", "echo"] | None, Parameter(help="engine of the embedded endpoint", group=JOBS)
    ] = None
    service_time: Annotated[
        str | None, Parameter(help="simulated time per job (echo engine), for example 2s", group=JOBS)
    ] = None
    slots: Annotated[int | None, Parameter(help="jobs that the embedded endpoint executes at once", group=JOBS)] = None
    faults: Annotated[
        str | None, Parameter(help="inject faults: a faults file for the embedded endpoint", group=JOBS)
    ] = None
    max_in_flight: Annotated[
        str | None, Parameter(help="jobs in flight: auto (default), auto:16-512, or a number", group=LIMITS)
    ] = None
    rate: Annotated[str | None, Parameter(help="submits per second, for example 5/s", group=LIMITS)] = None
    updates: Annotated[
        Literal["poll", "stream", "webhook"] | None,
        Parameter(help="how completions are detected: polling (default), status stream or webhooks", group=LIMITS),
    ] = None
    budget: Annotated[
        float | None, Parameter(help="most US dollars to spend, over all runs of this directory", group=LIMITS)
    ] = None
    deadline: Annotated[str | None, Parameter(help="finish within this time, for example 50m", group=LIMITS)] = None
    max_failures: Annotated[
        str | None, Parameter(help="stop when more jobs fail: a number or a percentage", group=LIMITS)
    ] = None
    limit: Annotated[int | None, Parameter(help="use only the first N rows", group=LIMITS)] = None
    download: Annotated[bool | None, Parameter(help="download result images (default: yes)", group=JOBS)] = None
    on_bad_row: Annotated[
        Literal["fail", "skip"] | None,
        Parameter(help="mark an invalid row as failed (default) or skipped", group=JOBS),
    ] = None

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the flags that were given, nested like the config file."""
        nested: dict[str, dict[str, Any]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                section, key = PLACES[field.name]
                plain = value.removesuffix("/s") if field.name == "rate" else value
                nested.setdefault(section, {})[key] = plain
        return nested
