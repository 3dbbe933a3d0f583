"""A fal host given as a URL: every command refuses it before anything is sent or paid."""

from __future__ import annotations

import json

import pytest

from batch.api import plan_sync, run_sync
from batch.config import Settings, TargetSettings
from batch.errors import ConfigError
from batch.targets import open_platform, open_target, profile_of
from tests.acceptance.command import restyle, results, write_manifest
from tests.acceptance.test_money import doorkeeper

URL = "https://queue.fal.run"


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "m.csv", range(2))


@pytest.fixture
def door():
    """A proxy for all traffic, and the requests that it received."""
    with doorkeeper() as (url, heard):
        yield {"FAL_KEY": "id:secret", "HTTPS_PROXY": url, "HTTP_PROXY": url, "ALL_PROXY": url}, heard


def refused(ended, heard):
    assert ended.code == 2, ended.text
    assert "--target fal" in ended.err
    assert ended.err.count("\n") == 1
    assert heard == []


@pytest.mark.parametrize(
    "options", [("plan",), ("plan", "--live-price"), ("run", "--yes"), ("run", "--budget", 1)], ids=str
)
def test_a_host_of_fals_is_refused_before_anything_is_sent(tmp_path, manifest, door, options):
    """No health check, no price, no key, no run directory."""
    env, heard = door
    command, *flags = options
    directory = tmp_path / "run"
    refused(restyle(command, manifest, "-o", directory, "--target", URL, *flags, env=env), heard)
    assert not directory.exists()


def test_a_run_made_with_such_a_url_asks_nothing_more_of_it(tmp_path, manifest, door):
    """Commands that contact the target say how to continue; commands without a target work as before."""
    env, heard = door
    directory = tmp_path / "run"
    assert restyle("run", manifest, "-o", directory, "--engine", "echo", "--no-download").code == 0
    facts = json.loads((directory / "run.json").read_text())
    facts["config"]["target"]["name"] = facts["target"] = URL
    (directory / "run.json").write_text(json.dumps(facts))
    for command in ("reconcile", "cancel", "audit"):
        refused(restyle(command, directory, env=env), heard)
    assert URL in restyle("status", directory, env=env).out
    assert restyle("export", directory, env=env).code == 0
    assert results(directory)["status"].to_pylist() == ["done", "done"]
    assert heard == []


def test_the_library_refuses_it_too(tmp_path, manifest):
    """In its settings, also if they were created without validation."""
    settings = {"target": {"name": URL}}
    for call in (
        lambda: plan_sync(manifest, settings=settings),
        lambda: run_sync(manifest, tmp_path / "run", settings=settings),
    ):
        with pytest.raises(ConfigError, match="--target fal"):
            call()


@pytest.mark.anyio
async def test_settings_without_checks_open_nothing(tmp_path):
    """The last check before a connection."""
    unchecked = Settings.model_construct(
        **{**dict(Settings()), "target": TargetSettings.model_construct(**{**dict(TargetSettings()), "name": URL})}
    )
    with pytest.raises(ConfigError, match="--target fal"):
        profile_of(unchecked)
    for opened in (open_target(unchecked, tmp_path, version="0"), open_platform(unchecked, version="0")):
        with pytest.raises(ConfigError, match="--target fal"):
            await opened.__aenter__()


@pytest.fixture
def anyio_backend():
    return "asyncio"
