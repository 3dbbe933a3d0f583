"""`GET /metrics`: the server's counters for Prometheus.

Defines the names of the metrics. They are built from the counters on each scrape, in a registry per application, so
that two servers in one process do not share metrics. Label values come from fixed sets: no paths, ids or prompts.
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
    """The handler, and the collector of its registry."""

    def __init__(self, service: QueueService) -> None:
        self._service = service
        self._registry: CollectorRegistry | None = None

    async def get(self, request: web.Request) -> web.Response:
        """Return all metrics as OpenMetrics if the client accepts it, else as Prometheus text."""
        # Imported on first use, so that embedded endpoints, which are not scraped, start faster.
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        if self._registry is None:
            self._registry = CollectorRegistry()
            self._registry.register(self)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(self._registry), headers={"content-type": content_type})

    def describe(self) -> list[Metric]:
        """Return nothing, so that the registry does not collect the metrics to learn their names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        info, counts, tally = self._service.engine, self._service.statistics(), self._service.tally
        build = {"engine": info.name, "model": info.model, "revision": info.revision, "version": tool_version()}
        build["safety_checker"] = info.safety_checker or "not checked"
        yield InfoMetricFamily("restyle_build", "Engine, model and version of this server", build)
        yield CounterMetricFamily(
            "restyle_requests_accepted",
            "Requests accepted since the start, without repeated idempotency keys",
            counts.accepted - tally.accepted_before,
        )
        ended = CounterMetricFamily(
            "restyle_requests_ended", "Requests that ended since the start, by outcome", labels=["outcome"]
        )
        for outcome in EndKind:
            ended.add_metric([outcome.value], tally.outcomes[outcome])
        yield ended
        yield GaugeMetricFamily("restyle_queue_depth", "Waiting requests", counts.waiting)
        yield GaugeMetricFamily("restyle_requests_running", "Running requests", counts.running)
        yield GaugeMetricFamily("restyle_engine_slots", "Maximum number of requests executed at once", info.slots)
        bounds = [*map(str, SECONDS_BOUNDS), "+Inf"]
        yield HistogramMetricFamily(
            "restyle_engine_seconds",
            "Engine time per result in seconds",
            list(zip(bounds, accumulate(tally.engine_buckets), strict=True)),
            tally.engine_seconds_total,
        )
        answers = CounterMetricFamily(
            "restyle_http_answers", "HTTP responses, by route and status", labels=["route", "status"]
        )
        for (route, status), count in sorted(tally.answers.items()):
            answers.add_metric([route, str(status)], count)
        yield answers
