"""Swept and configured prompt templates in the real command: filled before they are sent, or refused."""

from __future__ import annotations

import pytest

from tests.acceptance.command import restyle, results
from tests.acceptance.test_money import doorkeeper


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("image_url,animal\nhttps://images.example/1.jpg,dog\nhttps://images.example/2.jpg,cat\n")
    return path


def test_a_swept_prompt_is_filled_from_the_row_before_it_is_sent(tmp_path, manifest):
    """Each row x cell has its own prompt; the cell's id comes from the template."""
    config = tmp_path / "c.toml"
    config.write_text('[sweep]\nprompt = ["a {animal}", "{{b}}"]\n')
    directory = tmp_path / "run"
    ended = restyle("run", manifest, "-o", directory, "-c", config, "--engine", "echo", "--no-download")
    assert ended.code == 0, ended.text
    table = results(directory)
    assert table["prompt"].to_pylist() == ["a dog", "{b}", "a cat", "{b}"]
    first, _, third, _ = table["cell"].to_pylist()
    assert first == third
    assert first.startswith("prompt=a-animal~")


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    "given",
    [
        ("[sweep]\nprompt = ['b', 'a {aminal}']\n", {}),
        ("[input]\nprompt = 'a {aminal}'\n", {}),
        ("", {"RESTYLE_INPUT__PROMPT": "a {aminal}"}),
        ("", {"RESTYLE_SWEEP": '{"prompt": ["a {aminal}"]}'}),
    ],
    ids=["swept", "configured", "environment", "swept by environment"],
)
def test_an_unknown_name_is_refused_before_anything_is_sent(tmp_path, manifest, command, given):
    """Exit 2 with the nearest column; there is no connection and no run directory."""
    text, env = given
    config = tmp_path / "c.toml"
    config.write_text(text)
    directory = tmp_path / "run"
    with doorkeeper() as (url, heard):
        ended = restyle(command, manifest, "-o", directory, "-c", config, "--target", url, env=env)
    assert ended.code == 2
    assert "did you mean 'animal'?" in ended.err
    assert ended.err.count("\n") == 1
    assert heard == []
    assert not directory.exists()
