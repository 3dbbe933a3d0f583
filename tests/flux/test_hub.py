"""Resolution of hub ids, with the real hub client and a fake hub on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from batch.errors import InputError
from batch.server.engines.flux.folder import check_model
from batch.server.engines.flux.hub import MODEL_FILES, located

SINGLE = "flux1-dev.safetensors"
"""The copy of the weights in a single file, which must not be downloaded."""
COMMIT = "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    """A hub that serves the tiny model as `tester/FLUX.1-dev` and denies access to `tester/gated`."""
    folder = models / "published"
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            asked.append(self.path)
            known = "/tester/" in self.path
            if "/tree/" in self.path and known:
                listed = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in [*names, SINGLE]]
                self.send(200, json.dumps(listed).encode())
            elif self.path.startswith("/api/models/") and known:
                listed = [{"rfilename": name} for name in [*names, SINGLE]]
                self.send(200, json.dumps({"id": "tester/FLUX.1-dev", "sha": COMMIT, "siblings": listed}).encode())
            elif not known:
                self.send(404, b"{}", {"x-error-code": "RepoNotFound"})
            elif "/gated/" in self.path:
                self.send(403, b"{}", {"x-error-code": "GatedRepo"})
            else:
                data = (folder / self.path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                self.send(200, data, {"x-repo-commit": COMMIT, "etag": f'"{digest}"'})

        def send(self, status, body, headers=()):
            self.send_response(status)
            for name, value in {"content-length": len(body), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_a_model_is_downloaded_once_and_identified_by_its_commit(hub):
    """Only the required files are fetched; the second call does not contact the hub."""
    found = located("tester/FLUX.1-dev", MODEL_FILES, check_model)
    assert (found.name, found.revision) == ("tester/FLUX.1-dev", COMMIT[:12])
    assert not any(SINGLE in path for path in hub)
    hub.clear()
    assert located("tester/FLUX.1-dev", MODEL_FILES, check_model) == found
    assert hub == []
    (found.path / "vae/config.json").unlink()
    assert located("tester/FLUX.1-dev", MODEL_FILES, check_model) == found
    assert hub, "an incomplete download must be continued"


def test_errors_of_the_hub_have_advice(hub):
    """Cases: a licence that was not accepted, and an unknown repository."""
    with pytest.raises(InputError, match=r"accept its licence at \S+/tester/gated, then .*hf auth login"):
        located("tester/gated", MODEL_FILES, check_model)
    with pytest.raises(InputError, match="absent/model: repository not found") as caught:
        located("absent/model", MODEL_FILES, check_model)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_has_advice(hub, monkeypatch):
    """The message suggests a local folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="set --model to a local folder"):
        located("tester/FLUX.1-dev", MODEL_FILES, check_model)


def test_a_local_folder_has_precedence(models, tmp_path, monkeypatch):
    """An existing folder is used even if its path looks like a hub id; a missing path does not query the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "plain", tmp_path / "tester/model")
    assert located("tester/model", MODEL_FILES, check_model).path == Path("tester/model")
    for given in ("./nothing", "/no/such/folder"):
        with pytest.raises(InputError, match="model folder not found"):
            located(given, MODEL_FILES, check_model)
