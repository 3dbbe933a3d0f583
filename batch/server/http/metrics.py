"""`GET /metrics`: the server's counts as Prometheus reads them.

Owns the names of the metrics. They are made of the tally's plain numbers when somebody looks, in a registry that
belongs to this application alone: two servers in one process do not mix. Whatever may stand in a label is bounded:
no path, no id, no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from aiohttp import web

from batch.server.http.routing import Route, read_routes
from batch.server.queue.service import QueueService
from batch.server.queue.stats import SECONDS_BOUNDS, EndKind
from batch.version import tool_version

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["routes"]


def routes(service: QueueService) -> list[Route]:
    """Build the route table."""
    return read_routes("/metrics", _Metrics(service).get)


class _Metrics:
    """The handler, and the collector that the registry asks."""

    def __init__(self, service: QueueService) -> None:
        self._service = service
        self._registry: CollectorRegistry | None = None

    async def get(self, request: web.Request) -> web.Response:
        """All metrics, as OpenMetrics where the reader prefers it, else as the older Prometheus text."""
        # Imported at the first look: a run's embedded endpoint is never looked at and starts the sooner.
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        if self._registry is None:
            self._registry = CollectorRegistry()
            self._registry.register(self)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(self._registry), headers={"content-type": content_type})

    def describe(self) -> list[Metric]:
        """Nothing: the registry then need not ask for the numbers to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers as they stand."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        info, counts, tally = self._service.engine, self._service.statistics(), self._service.tally
        build = {"engine": info.name, "model": info.model, "revision": info.revision, "version": tool_version()}
        build["safety_checker"] = info.safety_checker or "not checked"
        yield InfoMetricFamily("restyle_build", "What runs here", build)
        yield CounterMetricFamily(
            "restyle_requests_accepted",
            "Requests accepted since the start; repeats with the same Idempotency-Key are not counted",
            counts.accepted - tally.accepted_before,
        )
        ended = CounterMetricFamily("restyle_requests_ended", "Requests ended since the start", labels=["outcome"])
        for outcome in EndKind:
            ended.add_metric([outcome.value], tally.outcomes[outcome])
        yield ended
        yield GaugeMetricFamily("restyle_queue_depth", "Requests that wait", counts.waiting)
        yield GaugeMetricFamily("restyle_requests_running", "Requests in the hands of the engine", counts.running)
        yield GaugeMetricFamily("restyle_engine_slots", "Requests that the engine executes at once", info.slots)
        bounds = [*map(str, SECONDS_BOUNDS), "+Inf"]
        yield HistogramMetricFamily(
            "restyle_engine_seconds",
            "Time that the engine took for a result",
            list(zip(bounds, accumulate(tally.engine_buckets), strict=True)),
            tally.engine_seconds_total,
        )
        answers = CounterMetricFamily("restyle_http_answers", "HTTP answers", labels=["route", "status"])
        for (route, status), count in sorted(tally.answers.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
