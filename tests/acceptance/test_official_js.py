"""Compatibility with npm's unmodified `@fal-ai/client` on Node: `restyle serve`, configured in two ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import fal_client
import httpx
import pytest
from filelock import FileLock

from tests.acceptance.command import REPOSITORY, environment
from tests.acceptance.endpoint import APP, INPUT, believed, callbacks, endpoint, image_bytes, is_same, large_file

SCRIPTS = REPOSITORY / "tests" / "acceptance" / "js"
MODULES = REPOSITORY / ".cache" / "js"
INSTALL = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]


@pytest.fixture(scope="module")
def modules():
    """The client of the lock file, installed once."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        absent = f"{' and '.join(missing)} not found: fal's JavaScript client needs Node 20 or newer with npm"
        if os.environ.get("CI") == "true":
            pytest.fail(absent)
        pytest.skip(absent)
    MODULES.mkdir(parents=True, exist_ok=True)
    with FileLock(MODULES / "lock"):
        lock = (SCRIPTS / "package-lock.json").read_bytes()
        installed = MODULES / "package-lock.json"
        if not (MODULES / "node_modules").is_dir() or not installed.exists() or installed.read_bytes() != lock:
            shutil.copy(SCRIPTS / "package.json", MODULES)
            shutil.copy(SCRIPTS / "package-lock.json", MODULES)
            subprocess.run(INSTALL, cwd=MODULES, check=True, capture_output=True, text=True)
    return MODULES


@pytest.fixture(scope="module")
def server(tmp_path_factory, modules):
    """A server with real, quickly made images."""
    with endpoint(tmp_path_factory.mktemp("preview"), "--slots", "1", "--allow-private") as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory, modules):
    """A server with one slot and endless jobs."""
    options = ("--engine", "echo", "--slots", "1", "--service-time", "1h")
    with endpoint(tmp_path_factory.mktemp("slow"), *options) as running:
        yield running


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(image_bytes())
    return path


@pytest.fixture(params=["middleware", "proxy"])
def ask(request):
    """Recipes D and E. Returns the output of the client's script."""

    def run(running, action, key=None, **options):
        variables = {"ENDPOINT": running.url, "CREDENTIALS": key or running.key, "MODULES": str(MODULES)}
        command = ["node", str(SCRIPTS / "client.mjs"), request.param, action, json.dumps(options)]
        ended = subprocess.run(command, env=environment(variables), capture_output=True, text=True, timeout=90)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def given(path, **inputs):
    """Return an input whose source is a data URI."""
    return {"image_url": fal_client.encode(path.read_bytes(), "image/png"), "prompt": "a cat as a watercolor", **inputs}


def test_it_is_the_client_that_we_name(modules):
    """Installed as pinned."""
    package = json.loads((modules / "node_modules" / "@fal-ai" / "client" / "package.json").read_text())
    pinned = json.loads((SCRIPTS / "package.json").read_text())["dependencies"]["@fal-ai/client"]
    assert package["version"] == pinned == "1.10.1"


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe_shows_logs_and_gives_the_result(server, ask, image, mode):
    """By polling and by server-sent events: updates with log lines, then the output."""
    said = ask(server, "subscribe", input=given(image, seed=12345), mode=mode)
    assert (said["data"]["seed"], said["data"]["images"][0]["width"]) == (12345, 320)
    assert said["updates"][-1]["status"] == "COMPLETED"
    assert said["updates"][-1]["request_id"] == said["requestId"]
    assert said["updates"][-1]["metrics"]["inference_time"] > 0
    lines = [line for update in said["updates"] for line in update.get("logs") or []]
    assert lines
    assert all(line.keys() == {"message", "timestamp", "level", "source", "labels"} for line in lines)


def test_submit_status_and_result(server, ask, image):
    """The three calls one by one; the URLs in the responses are our own, also through the proxy."""
    said = ask(server, "queue", input=given(image))
    assert said["ticket"]["status"] == "IN_QUEUE"
    assert said["ticket"]["response_url"].startswith(server.url)
    assert (said["status"]["status"], said["result"]["requestId"]) == ("COMPLETED", said["ticket"]["request_id"])
    assert said["result"]["data"]["images"][0]["url"].startswith(server.url)


def test_the_direct_call_gives_the_result(server, ask, image):
    """`fal.run`: the same path as a submit, on another of fal's hosts."""
    assert ask(server, "run", input=given(image))["data"]["images"]


def test_a_running_request_can_be_cancelled(slow, ask):
    """COMPLETED, and the result is the client's own error with status 499."""
    said = ask(slow, "cancel", input=INPUT)
    assert (said["status"]["status"], said["status"]["error_type"]) == ("COMPLETED", "client_cancelled")
    assert (said["error"]["isApiError"], said["error"]["status"]) == (True, 499)


def test_a_blob_in_the_input_is_uploaded_and_used(server, ask, image):
    """The client replaces it with the upload's URL."""
    said = ask(server, "blob", path=str(image), type="image/png", input={"prompt": "a cat"})
    assert said["data"]["images"][0]["width"] == 320


def test_a_file_above_the_threshold_is_uploaded_in_parts(server, ask, tmp_path):
    """91 MiB in parts; served again byte for byte."""
    path = large_file(tmp_path / "large.png", 91)
    url = ask(server, "upload", path=str(path), type="image/png")["url"]
    assert url.startswith(server.url)
    assert is_same(url, path)


def test_a_webhook_is_called_and_signed(server, ask, image):
    """One callback with the result; its signature is valid for the keys that the server publishes."""
    with callbacks() as receiver:
        ticket = ask(server, "webhook", input=given(image), webhookUrl=receiver.url)
        said = believed(server, *receiver.one())
    assert (said["request_id"], said["status"]) == (ticket["request_id"], "OK")
    assert said["payload"]["images"]


def test_a_wrong_input_is_the_client_s_validation_error(server, ask, image):
    """`ValidationError` with the message of each field."""
    error = ask(server, "fail", input=given(image, strength=5))["error"]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    (field,) = error["fieldErrors"]
    assert (field["loc"], field["type"], field["ctx"]) == (["body", "strength"], "less_than_equal", {"le": 1})


def test_a_image_that_is_none_is_the_client_s_validation_error(server, ask, tmp_path):
    """`image_load_error`, fal's model error for it."""
    path = tmp_path / "not an image.png"
    path.write_bytes(b"<html>not found</html>")
    error = ask(server, "fail", input=given(path))["error"]
    assert (error["name"], error["fieldErrors"][0]["type"]) == ("ValidationError", "image_load_error")


@pytest.mark.parametrize("key", ["tester:wrong", "unknown:secret"])
def test_a_wrong_key_is_refused(server, ask, key):
    """`ApiError` 401 with fal's message."""
    error = ask(server, "fail", key=key, input=INPUT)["error"]
    assert (error["isApiError"], error["name"], error["status"]) == (True, "ApiError", 401)
    assert error["body"] == {"detail": "No user found for Key ID and Secret"}


def test_a_start_timeout_ends_a_request_that_still_waits(slow, ask):
    """504 that names the user's own deadline: the client does not retry."""
    key = {"authorization": f"Key {slow.key}"}
    holder = httpx.post(f"{slow.url}/{APP}", json=INPUT, headers=key).json()
    error = ask(slow, "fail", input=INPUT, startTimeout=1.01)["error"]
    httpx.put(holder["cancel_url"], headers=key)
    assert (error["status"], error["timeoutType"], error["body"]["error_type"]) == (504, "user", "request_timeout")
