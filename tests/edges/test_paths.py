"""Paths that begin with a tilde that the shell does not expand: `--out=~/run`, or in quotes."""

import os
import pwd
from pathlib import Path

import pytest

from batch.errors import ConfigError
from batch.system.paths import at_home


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_at_the_start_is_the_home_folder(tmp_path, monkeypatch, kind) -> None:
    """The type of the argument is kept; a tilde elsewhere is an ordinary character."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    user = pwd.getpwuid(os.geteuid())
    expected = {
        "~": str(tmp_path),
        "~/m.csv": f"{tmp_path}/m.csv",
        "~/*.parquet": f"{tmp_path}/*.parquet",
        f"~{user.pw_name}/m.csv": f"{user.pw_dir}/m.csv",
        "a/~/m.csv": "a/~/m.csv",
        "~backup.csv": "~backup.csv",
        "m~": "m~",
    }
    assert {given: at_home(kind(given)) for given in expected} == {
        given: kind(path) for given, path in expected.items()
    }


def test_addresses_and_the_dash_stay_as_they_are() -> None:
    """URLs and `-` are not paths."""
    assert at_home("-") == "-"
    assert at_home("https://host/~user/m.csv") == "https://host/~user/m.csv"


def test_an_unknown_user_is_refused_unless_there_is_such_a_folder(tmp_path, monkeypatch) -> None:
    """Otherwise a run would silently create a folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="~no-such-user/run: there is no user 'no-such-user'; write the whole path"):
        at_home("~no-such-user/run")
    Path("~no-such-user").mkdir()
    assert at_home("~no-such-user/run") == "~no-such-user/run"


def test_an_unknown_home_is_refused(monkeypatch) -> None:
    """This is a container's user without a passwd entry and HOME."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["none"])
    for given in ("~", "~/run"):
        with pytest.raises(ConfigError, match="set HOME"):
            at_home(given)
