"""Fixtures with the tiny model. Without torch these tests are not collected; `make test-flux` installs it."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # as in the workers: equal inputs give equal pixels
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the tiny model in two layouts: `plain`, as diffusers saves it, and `published`, as on the hub."""
    from tests.flux import tiny

    root = tmp_path_factory.mktemp("models")
    tiny.save(root / "plain")
    tiny.save_as_published(root / "published")
    return root


@pytest.fixture(scope="session")
def checkers(tmp_path_factory):
    """Safety checkers of both kinds that flag everything, and one that flags nothing."""
    from tests.flux import tiny

    root = tmp_path_factory.mktemp("checkers")
    tiny.save_classifier(root / "classifier", flags=True)
    tiny.save_concepts(root / "concepts", flags=True)
    tiny.save_classifier(root / "content", flags=False)
    return root


@pytest.fixture(scope="session")
def plain(models):
    """Plain diffusers in this process, as the reference."""
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    folder = models / "plain"
    pipeline = diffusers.FluxImg2ImgPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def renderer(models):
    """The engine's renderer in this process, without a safety checker."""
    from tests.flux.rendering import opened

    return opened(models / "plain")
