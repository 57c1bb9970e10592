"""``/metrics``: the numbers of the service for Prometheus.

Nothing is kept up to date for it: a scrape reads what is there, all of it in memory or kept by
triggers. The text is made by prometheus_client, in the format
that the scraper asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from handlers.base import BaseHandler, Services
from jobs.measures import Histogram


class MetricsHandler(BaseHandler):
    """What Prometheus scrapes."""

    async def get(self) -> None:
        """The numbers now, of all owners."""
        registry = CollectorRegistry()
        registry.register(await _read(self.services))
        encode, content_type = choose_encoder(self.request.headers.get("Accept", ""))
        self.set_header("Content-Type", content_type)
        self.set_header("Vary", "Accept")
        self.set_header("Cache-Control", "no-store")
        self.write(encode(registry))


class _Read(Collector):
    """What one scrape has read."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The library's hook."""
        return iter(self._families)


async def _read(services: Services) -> _Read:
    manager, measures = services.manager, services.manager.measures
    files, stored_bytes = await services.files.stored(None)
    jobs = GaugeMetricFamily("sluice_jobs", "Jobs by kind and state.", labels=["kind", "state"])
    queued = 0
    for kind, state, n in await manager.tally(None):
        jobs.add_metric([kind, state], n)
        queued += n if state == "queued" else 0
    slow = CounterMetricFamily(
        "sluice_slow_steps",
        "Steps that held the loop for over 20 ms.",
        labels=["kind"],
    )
    worst = GaugeMetricFamily(
        "sluice_slowest_step_seconds", "The longest of these steps.", labels=["kind"]
    )
    for kind, steps in measures.slow_steps.items():
        slow.add_metric([kind], steps.n)
        worst.add_metric([kind], steps.worst_s)
    return _Read(
        [
            *(jobs, slow, worst),
            _gauge("sluice_queued_jobs", "Jobs that wait for a slot.", queued),
            _gauge("sluice_slots", "Processes that may run at once.", services.settings.slots),
            _gauge("sluice_used_slots", "Slots in use.", manager.running),
            _gauge("sluice_children", "Child processes.", len(services.children)),
            _gauge("sluice_subscribers", "Connections to the channel.", services.feeds.all),
            _gauge("sluice_waiting_requests", "Requests that wait for a job.", manager.waiting),
            _gauge("sluice_stored_files", "Stored files.", files),
            _gauge("sluice_stored_bytes", "Bytes of stored files.", stored_bytes),
            _gauge("sluice_free_bytes", "Room that is left.", await services.files.free_bytes()),
            _counter("sluice_received_bytes", "Bytes taken in.", services.uploads.received_bytes),
            _counter("sluice_sent_bytes", "Bytes of files sent.", services.downloads.sent_bytes),
            _histogram(
                "sluice_loop_lag_seconds",
                "How late the loop was.",
                services.now.lags,
            ),
            _histogram(
                "sluice_pause_seconds",
                "From a pause to its effect.",
                measures.pauses,
            ),
            _histogram(
                "sluice_cancel_seconds",
                "From a cancel to its end.",
                measures.cancels,
            ),
        ]
    )


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(name, about, value=value)


def _histogram(name: str, about: str, histogram: Histogram) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, about, buckets=buckets, sum_value=histogram.sum)
