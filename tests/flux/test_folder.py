"""Validation of model folders, and detection of name and revision."""

from __future__ import annotations

import json
import shutil

import pytest

from batch.errors import InputError
from batch.server.engines.flux.folder import check_checker, check_model
from tests.flux import tiny

COMMIT = "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the published layout, which the test damages."""
    return shutil.copytree(models / "published", tmp_path / "model")


def rejection(folder):
    with pytest.raises(InputError) as caught:
        check_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "hf download black-forest-labs/FLUX.1-dev --local-dir" in message or "needs FLUX.1 [dev]" in message
    return message


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("layout", ["plain", "published"])
def test_a_complete_folder_is_accepted(models, layout):
    """Both layouts have a name and a revision."""
    found = check_model(models / layout)
    assert found.name == layout
    assert found.revision.startswith("sha")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer.json",
        "transformer/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named_with_advice(folder, name):
    """Each of these files is required for loading."""
    (folder / name).unlink()
    part, _, file = name.rpartition("/")
    message = rejection(folder)
    assert file in message
    assert part in message
    assert "accept the licence" in message


def test_a_missing_shard_is_named(folder):
    """The index lists the shards."""
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"transformer/{shard.name} is missing" in rejection(folder)


def test_several_problems_are_named_at_once(folder):
    """One message lists all problems."""
    shutil.rmtree(folder / "text_encoder_2")
    shutil.rmtree(folder / "tokenizer")
    (folder / "vae/config.json").unlink()
    message = rejection(folder)
    assert all(word in message for word in ("text_encoder_2/config.json", "tokenizer/ has neither", "vae/config.json"))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_found_without_reading_it(folder, kept):
    """The file ends in the length, in the header, or one byte early."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    message = rejection(folder)
    assert "vae/diffusion_pytorch_model.safetensors" in message
    assert (f"{len(data) - 1} bytes, expected {len(data)}" if kept == -1 else "truncated") in message


def test_a_file_that_is_longer_than_its_header_says_is_found(folder):
    """This happens if two downloads write to the same file."""
    path = folder / "text_encoder/model.safetensors"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    assert f"text_encoder/model.safetensors has {size + 4} bytes, expected {size}" in rejection(folder)


def test_an_invalid_header_is_found(folder):
    """The header has the right length but is not JSON."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"not a header"
    path.write_bytes(bytes(data))
    assert "vae/diffusion_pytorch_model.safetensors has an invalid header" in rejection(folder)


def test_a_shard_without_its_tensors_is_found(folder):
    """The file of another shard has its name."""
    first, second = sorted((folder / "transformer").glob("*-of-*.safetensors"))[:2]
    shutil.copy(second, first)
    assert f"transformer/{first.name} lacks" in rejection(folder)


def test_a_git_lfs_pointer_is_recognized(folder):
    """After a clone without `git lfs` all files exist, with 130 bytes each."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 167666902\n")
    assert "is a Git LFS pointer" in rejection(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_an_invalid_index_is_found(folder, text):
    """Truncated, empty, or not an object."""
    (folder / "model_index.json").write_text(text)
    assert "model_index.json" in rejection(folder)


def test_another_model_is_recognized(folder):
    """Cases: another pipeline, FLUX.1 [schnell] and FLUX.1 Fill."""
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "another model (StableDiffusionXLPipeline)" in rejection(folder)
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    edit(folder / "transformer/config.json", guidance_embeds=False)
    assert "FLUX.1 [schnell]" in rejection(folder)
    edit(folder / "transformer/config.json", guidance_embeds=True, in_channels=384, out_channels=64)
    assert "Fill" in rejection(folder)


def test_a_missing_folder_is_rejected_with_advice(tmp_path):
    """The message says how to download the model."""
    assert "model folder not found" in rejection(tmp_path / "nothing")


def test_the_revision_is_the_commit_if_the_folder_records_it(models, tmp_path):
    """In the hub's cache the commit is the folder name; a download to a folder writes metadata files."""
    cached = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / COMMIT
    shutil.copytree(models / "published", cached)
    found = check_model(cached)
    assert (found.name, found.revision) == ("black-forest-labs/FLUX.1-dev", COMMIT[:12])
    local = shutil.copytree(models / "published", tmp_path / "my model")
    notes = local / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "model_index.json.metadata").write_text(f"{COMMIT}\netag\n1700000000.0\n")
    found = check_model(local)
    assert (found.name, found.revision) == ("my-model", COMMIT[:12])
    (notes / "other.json.metadata").write_text(f"{'0' * 40}\netag\n1700000000.0\n")
    assert check_model(local).revision.startswith("sha"), "files of two commits have no common commit"


def test_other_weights_are_another_revision(models, tmp_path):
    """Weights with the same shapes and other values have another revision; a copy has the same one."""
    first = check_model(models / "plain").revision
    assert check_model(shutil.copytree(models / "plain", tmp_path / "copy")).revision == first
    assert check_model(tiny.save(tmp_path / "other", seed=1)).revision != first


def test_safety_checkers_are_recognized_by_their_config(checkers, tmp_path, models):
    """Two kinds are supported; other classes and incomplete folders are rejected."""
    assert check_checker(checkers / "classifier").kind == "ViTForImageClassification"
    assert check_checker(checkers / "concepts").kind == "StableDiffusionSafetyChecker"
    with pytest.raises(InputError, match="safety checker folder not found"):
        check_checker(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing"):
        check_checker(models / "plain/text_encoder")
    broken = shutil.copytree(checkers / "classifier", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"model\.safetensors is truncated"):
        check_checker(broken)
    other = shutil.copytree(checkers / "classifier", tmp_path / "other")
    edit(other / "config.json", architectures=["ResNetForImageClassification"])
    with pytest.raises(InputError, match="ResNetForImageClassification"):
        check_checker(other)
    animals = tiny.save_classifier(tmp_path / "animals", flags=False, labels=("cat", "dog"))
    with pytest.raises(InputError, match='no label "nsfw"; its labels: cat, dog'):
        check_checker(animals)
