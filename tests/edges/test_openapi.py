"""`/openapi.json` against a running server, with calls by schemathesis, thousands with RESTYLE_SOAK=1."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from batch.fal.endpoint import ImageToImageInput, ImageToImageOutput
from batch.server.http import app as app_module
from batch.server.http.openapi import document
from tests.edges.serving import SUBMIT, call, result, serving

SOAK = bool(os.environ.get("RESTYLE_SOAK"))
CASES_EACH = 120 if SOAK else 8
DOCUMENT = document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
"""Checks of responses only: a submit accepts more than the schema, because inputs are validated on execution."""
UNDESCRIBED = re.compile(r"/$|/page|/static|/metrics|/api/fal/proxy|/\{path\}|/v1/\{path\}|/run/\{app\}")
"""Routes outside of the API: the page, metrics, aliases and fallbacks."""


URL_LIMIT = 8000


def run(coroutine):
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Run a server process with the echo engine."""
    command = [sys.executable, "-m", "batch.server", "--engine", "echo", "--with-parent", "--data-dir"]
    folder = tmp_path_factory.mktemp("endpoint")
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*command, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        yield json.loads(server.stdout.readline())["url"]
        server.stdin.close()
        server.wait(20)
        server.stdout.close()
    assert "Traceback" not in (folder / "log").read_text()


@SCHEMA.parametrize()
@settings(
    max_examples=CASES_EACH,
    deadline=None,
    derandomize=not SOAK,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.timeout(1800 if SOAK else 120)
def test_the_server_conforms_to_its_schema(case, url):
    """No 5xx, and no undocumented status, content type, header or body."""
    if len(requests.Request(**case.as_transport_kwargs(base_url=url)).prepare().url) > URL_LIMIT:
        return  # rejected by the HTTP library before routing
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)


def test_the_schemas_are_valid():
    """Each is a valid JSON Schema; all references resolve; input and output are the endpoint's models."""
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert referred | {"ImageToImageInput"} == set(schemas)
    assert set(schemas["ImageToImageInput"]["properties"]) == set(ImageToImageInput.model_fields)
    assert set(schemas["ImageToImageOutput"]["properties"]) == set(ImageToImageOutput.model_fields)
    names = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in operations(item).values()]
    assert len(names) == len(set(names))


def operations(item):
    return {method: one for method, one in item.items() if method in {"get", "post", "put", "delete", "head"}}


def test_exactly_the_routes_are_documented(tmp_path, monkeypatch):
    """Every new route must be documented; queue paths are one route that parses them."""
    made, original = [], app_module.web.Application
    monkeypatch.setattr(app_module.web, "Application", lambda **given: made.append(original(**given)) or made[-1])

    async def use():
        async with serving(tmp_path) as session:
            status, headers, body = await call(session, "GET", "/openapi.json")
            assert (status, headers["content-type"]) == (200, "application/json")
            assert {**body, "info": None} == {**DOCUMENT, "info": None}

    run(use())
    routes = {
        (route.method.lower(), route.resource.canonical.replace("{token}{path}", "{token}/files/{prefix}/{name}"))
        for route in made[-1].router.routes()
        if route.method in {"GET", "POST", "PUT", "DELETE"} and not UNDESCRIBED.match(route.resource.canonical)
    }
    described = {
        (method, path)
        for path, item in DOCUMENT["paths"].items()
        for method in operations(item)
        if not path.startswith(("/fal-ai/", "/run/"))
    }
    assert routes == described


def test_a_number_that_json_cannot_represent_is_an_error(tmp_path):
    """The error repeats the input; such a number once crashed the server."""

    async def use():
        body = b'{"image_url": "x", "prompt": "y", "seed": %s}'
        async with serving(tmp_path) as session:
            for digits in (20, 400):
                status, _, ticket = await call(session, "POST", SUBMIT, data=body % (b"9" * digits))
                if digits == 400:
                    assert status == 422
                    continue
                status, _, answer = await result(session, ticket["request_id"])
                assert (status, answer["detail"][0]["loc"]) == (422, ["body", "seed"])

    run(use())
