"""Compatibility with PyPI's unmodified `fal-client`: `restyle serve`, configured as in docs/endpoint.md."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from importlib.metadata import version

import fal_client
import fal_client.client
import pytest

from tests.acceptance.command import environment
from tests.acceptance.endpoint import (
    APP,
    INPUT,
    believed,
    callbacks,
    endpoint,
    image_bytes,
    is_same,
    large_file,
    tunnel,
)
from tests.certificate import certificate

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client never closes its upload connections

HTTPError = fal_client.client.FalClientHTTPError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with real, quickly made images."""
    with endpoint(tmp_path_factory.mktemp("preview"), "--slots", "1", "--allow-private") as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server with one slot and endless jobs."""
    options = ("--engine", "echo", "--slots", "1", "--service-time", "1h")
    with endpoint(tmp_path_factory.mktemp("slow"), *options) as running:
        yield running


@pytest.fixture
def point(monkeypatch):
    """Recipe A: the module's globals. Returns a client for a server."""
    clients = []

    def client(running, key=None):
        for name in ("QUEUE_URL_FORMAT", "RUN_URL_FORMAT"):
            path = "/run/" if name == "RUN_URL_FORMAT" else "/"
            monkeypatch.setattr(fal_client.client, name, running.url + path)
        for name in ("REST_URL", "CDN_URL"):
            monkeypatch.setattr(fal_client.client, name, running.url)
        clients.append(fal_client.SyncClient(key=key or running.key))
        return clients[-1]

    yield client
    for one in clients:
        one._client.close()
    gc.collect()


def test_it_is_the_client_that_we_name():
    """The newest version on PyPI, as in docs/endpoint.md."""
    assert version("fal-client") == "1.0.3"


def test_subscribe_shows_logs_and_gives_the_result(server, point):
    """From the call to the image: updates with log lines, then the output with the requested seed."""
    seen = []
    image = fal_client.encode(image_bytes(), "image/png")
    given = {"image_url": image, "prompt": "a cat as a watercolor", "seed": 2**60}
    output = point(server).subscribe(APP, given, with_logs=True, on_queue_update=seen.append)
    assert (output["seed"], output["prompt"]) == (2**60, given["prompt"])
    assert (output["images"][0]["width"], output["images"][0]["content_type"]) == (320, "image/jpeg")
    assert isinstance(seen[-1], fal_client.Completed)
    assert seen[-1].logs
    assert all(line.keys() == {"message", "timestamp", "level", "source", "labels"} for line in seen[-1].logs)
    assert seen[-1].metrics["inference_time"] > 0


def test_submit_status_and_result_by_handle_and_by_id(server, point):
    """The returned URLs and those built by the client give the same responses."""
    client = point(server)
    handle = client.submit(APP, {**INPUT, "image_url": fal_client.encode(image_bytes(), "image/png")}, priority="low")
    *_, last = handle.iter_events(with_logs=True)
    assert isinstance(last, fal_client.Completed)
    by_id = client.get_handle(APP, handle.request_id)
    assert isinstance(by_id.status(), fal_client.Completed)
    assert by_id.get() == handle.get() == client.result(APP, handle.request_id)


def test_the_direct_call_and_the_async_client_give_results_too(server, point):
    """`run` on the direct host; `AsyncClient.subscribe`."""
    given = {**INPUT, "image_url": fal_client.encode(image_bytes(), "image/png")}
    client = point(server)
    assert client.run(APP, given)["images"]

    async def use():
        asynchronous = fal_client.AsyncClient(key=server.key)
        output = await asynchronous.subscribe(APP, given)
        await (await asynchronous._client).aclose()
        return output

    assert asyncio.run(use())["images"]


def test_a_queued_and_a_running_request_can_be_cancelled(slow, point):
    """Queued with its position, then gone; the result is the client's own error with status 499."""
    client = point(slow)
    running, queued = (client.submit(APP, INPUT) for _ in range(2))
    assert client.status(APP, queued.request_id) == fal_client.Queued(position=0)
    for handle in (queued, running):
        handle.cancel()
        with pytest.raises(HTTPError) as cancelled:
            handle.get()
        assert (cancelled.value.status_code, cancelled.value.error_type) == (499, "client_cancelled")


def test_uploaded_bytes_can_be_used_as_the_source(server, point):
    """`upload` returns a URL that the endpoint can read."""
    client = point(server)
    url = client.upload(image_bytes("teal"), "image/png", file_name="../a cat.png")
    assert client.subscribe(APP, {**INPUT, "image_url": url})["images"]


def test_a_file_above_the_threshold_is_uploaded_in_parts(server, point, tmp_path):
    """101 MiB in parts that arrive out of order; served again byte for byte."""
    path = large_file(tmp_path / "large.png", 101)
    url = point(server).upload_file(path)
    assert url.startswith(server.url)
    assert is_same(url, path)


def test_a_webhook_is_called_and_signed(server, point):
    """One callback with the result; its signature is valid for the keys that the server publishes."""
    with callbacks() as receiver:
        given = {**INPUT, "image_url": fal_client.encode(image_bytes(), "image/png")}
        handle = point(server).submit(APP, given, webhook_url=receiver.url)
        said = believed(server, *receiver.one())
    assert (said["request_id"], said["status"]) == (handle.request_id, "OK")
    assert said["payload"] == handle.get()


def test_a_wrong_input_is_the_client_s_own_error(server, point):
    """422 with the message of each field."""
    with pytest.raises(HTTPError) as refused:
        point(server).subscribe(APP, {**INPUT, "strength": 5, "num_images": "many"})
    assert refused.value.status_code == 422
    detail = refused.value.response.json()["detail"]
    assert {(one["loc"][-1], one["type"]) for one in detail} == {
        ("strength", "less_than_equal"),
        ("num_images", "int_parsing"),
    }


@pytest.mark.parametrize("key", ["tester:wrong", "unknown:secret", "no-colon"])
def test_a_wrong_key_is_refused_at_once(server, point, key):
    """401, raised in the caller and not repeated."""
    with pytest.raises(HTTPError) as refused:
        point(server, key=key).submit(APP, INPUT)
    assert refused.value.status_code == 401


def test_a_start_timeout_ends_a_request_that_still_waits(slow, point):
    """504 that names the user's own deadline: the client does not retry."""
    client = point(slow)
    first = client.submit(APP, INPUT)
    with pytest.raises(HTTPError) as late:
        client.submit(APP, INPUT, start_timeout=1.01).get()
    first.cancel()
    assert (late.value.status_code, late.value.error_type) == (504, "request_timeout")
    assert late.value.response_headers["x-fal-request-timeout-type"] == "user"


RECIPE_B = """
import json, sys, fal_client
handle = fal_client.submit(sys.argv[1], json.loads(sys.argv[2]))
*_, last = handle.iter_events()
print(json.dumps({"status": type(last).__name__, "result": handle.get(), "url": handle.response_url}))
"""


def test_environment_variables_alone_point_it_at_a_server_with_tls(tmp_path):
    """Recipe B: FAL_RUN_HOST, FAL_QUEUE_RUN_HOST and SSL_CERT_FILE; the client always uses https."""
    cert, key = certificate(tmp_path)
    with endpoint(tmp_path, "--engine", "echo", "--tls-cert", cert, "--tls-key", key) as running:
        assert running.url.startswith("https://127.0.0.1:")
        host = running.url.removeprefix("https://")
        variables = {"FAL_RUN_HOST": host, "FAL_QUEUE_RUN_HOST": host, "SSL_CERT_FILE": str(cert)}
        command = [sys.executable, "-c", RECIPE_B, APP, json.dumps({**INPUT, "seed": 3})]
        env = environment({**variables, "FAL_KEY": running.key})
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        said = json.loads(ended.stdout)
    assert (said["status"], said["result"]["seed"]) == ("Completed", 3)
    assert said["url"].startswith(running.url)


RECIPE_C = """
import json, sys, fal_client
app, given = sys.argv[1], json.loads(sys.argv[2])
given["image_url"] = fal_client.upload(bytes.fromhex(sys.argv[3]), "image/png")
ran, queued = fal_client.run(app, given), fal_client.subscribe(app, given)
print(json.dumps({"source": given["image_url"], "run": ran["images"], "queue": queued["images"]}))
"""
HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "v3.fal.media")


def test_under_fal_s_own_host_names_the_unchanged_client_runs_queues_and_uploads(tmp_path):
    """Recipe C: all fal hosts resolve to this machine. `run` uses its own host, `subscribe` is queued, same path."""
    cert, key = certificate(tmp_path, *HOSTS)
    with endpoint(tmp_path, "--slots", "1", "--tls-cert", cert, "--tls-key", key) as running:
        port = int(running.url.rpartition(":")[2])
        with tunnel(port) as (proxy_url, asked_for):
            variables = {"HTTPS_PROXY": proxy_url, "SSL_CERT_FILE": str(cert), "FAL_KEY": running.key}
            command = [sys.executable, "-c", RECIPE_C, APP, json.dumps({**INPUT, "seed": 3}), image_bytes().hex()]
            ended = subprocess.run(command, env=environment(variables), capture_output=True, text=True, timeout=60)
            assert ended.returncode == 0, ended.stderr
            said = json.loads(ended.stdout)
    assert said["source"].startswith("https://")
    assert (len(said["run"]), len(said["queue"])) == (1, 1)
    assert said["run"][0]["url"].startswith("https://fal.run/files/")
    assert said["queue"][0]["url"].startswith("https://queue.fal.run/files/")
    assert {"fal.run:443", "queue.fal.run:443"} <= set(asked_for) <= {f"{host}:443" for host in HOSTS}
