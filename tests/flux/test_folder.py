"""What a folder lacks is said by name before anything is loaded, and what it holds is known by its revision."""

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
    """A copy of the published layout, to be spoilt."""
    return shutil.copytree(models / "published", tmp_path / "model")


def refusal(folder):
    with pytest.raises(InputError) as caught:
        check_model(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    assert (
        "hf download black-forest-labs/FLUX.1-dev --local-dir" in said or "this endpoint is" in said or "takes" in said
    )
    return said


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("layout", ["plain", "published"])
def test_a_whole_folder_is_accepted(models, layout):
    """Both layouts, with a name and a revision."""
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
def test_a_missing_file_is_named_with_what_to_do(folder, name):
    """Each of the files without which loading fails, most of them late and with other words."""
    (folder / name).unlink()
    part, _, file = name.rpartition("/")
    said = refusal(folder)
    assert file in said
    assert part in said
    assert "accept the licence" in said


def test_a_missing_shard_is_named(folder):
    """By the index that names it."""
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"transformer/{shard.name} is missing" in refusal(folder)


def test_several_problems_are_named_at_once(folder):
    """One look, one sentence."""
    shutil.rmtree(folder / "text_encoder_2")
    shutil.rmtree(folder / "tokenizer")
    (folder / "vae/config.json").unlink()
    said = refusal(folder)
    assert all(word in said for word in ("text_encoder_2/config.json", "tokenizer/ has neither", "vae/config.json"))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_found_without_reading_it(folder, kept):
    """Broken off in the length, in the header, or one byte before the end."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    said = refusal(folder)
    assert "vae/diffusion_pytorch_model.safetensors" in said
    assert ("of" in said) if kept == -1 else ("cut short" in said)


def test_a_file_with_more_than_its_header_says_is_found(folder):
    """Two downloads into one file."""
    path = folder / "text_encoder/model.safetensors"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    assert f"text_encoder/model.safetensors has {size + 4} of {size} bytes" in refusal(folder)


def test_a_broken_header_is_found(folder):
    """The right length, and no JSON inside."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"not a header"
    path.write_bytes(bytes(data))
    assert "vae/diffusion_pytorch_model.safetensors has a broken header" in refusal(folder)


def test_a_shard_without_its_tensors_is_found(folder):
    """A shard of another download under the right name."""
    first, second = sorted((folder / "transformer").glob("*-of-*.safetensors"))[:2]
    shutil.copy(second, first)
    assert f"transformer/{first.name} lacks" in refusal(folder)


def test_a_pointer_of_git_lfs_is_called_one(folder):
    """A clone without `git lfs`: all files there, 130 bytes each."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 167666902\n")
    assert "is a Git LFS pointer" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_index_is_found(folder, text):
    """Cut short, or something else."""
    (folder / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(folder)


def test_another_model_is_called_by_its_name(folder):
    """Another pipeline; FLUX.1 [schnell]; FLUX.1 Fill."""
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "another model (StableDiffusionXLPipeline)" in refusal(folder)
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    edit(folder / "transformer/config.json", guidance_embeds=False)
    assert "FLUX.1 [schnell]" in refusal(folder)
    edit(folder / "transformer/config.json", guidance_embeds=True, in_channels=384, out_channels=64)
    assert "Fill" in refusal(folder)


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    """With how to get one."""
    assert "there is no model folder" in refusal(tmp_path / "nothing")


def test_the_revision_is_the_commit_where_the_folder_tells_it(models, tmp_path):
    """In the hub's cache the folder is named for it; a download into a folder leaves notes."""
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
    assert check_model(local).revision.startswith("sha"), "two commits are none"


def test_other_weights_are_another_revision(models, tmp_path):
    """The same shapes with other values; and a copy of the same is the same."""
    first = check_model(models / "plain").revision
    assert check_model(shutil.copytree(models / "plain", tmp_path / "copy")).revision == first
    assert check_model(tiny.save(tmp_path / "other", seed=1)).revision != first


def test_safety_checkers_are_known_by_their_config(checkers, tmp_path, models):
    """Two kinds; anything else is said to be none, and so is one without its parts."""
    assert check_checker(checkers / "classifier").kind == "ViTForImageClassification"
    assert check_checker(checkers / "concepts").kind == "StableDiffusionSafetyChecker"
    with pytest.raises(InputError, match="there is no folder"):
        check_checker(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing"):
        check_checker(models / "plain/text_encoder")
    broken = shutil.copytree(checkers / "classifier", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"model\.safetensors is cut short"):
        check_checker(broken)
    other = shutil.copytree(checkers / "classifier", tmp_path / "other")
    edit(other / "config.json", architectures=["ResNetForImageClassification"])
    with pytest.raises(InputError, match="ResNetForImageClassification"):
        check_checker(other)
    animals = tiny.save_classifier(tmp_path / "animals", flags=False, labels=("cat", "dog"))
    with pytest.raises(InputError, match='no label "nsfw" but cat, dog'):
        check_checker(animals)
