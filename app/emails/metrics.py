"""Metrics for Prometheus.

The values come from the database, so every process returns the same values.
"""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from django.db.models import Count, Min, Sum
from django.utils import timezone
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from emails.models import NEEDS_OPERATOR, Counter, Delivery
from emails.states import UNFINISHED, State

OUTCOMES = (State.SENT, State.DEFERRED, State.UNCERTAIN, State.FAILED)


def seconds_since(then: datetime | None) -> float:
    return max((timezone.now() - then).total_seconds(), 0) if then else 0


class Collector:
    def collect(self) -> Iterator[Metric]:
        totals: dict[str, int] = defaultdict(int)
        seconds: dict[str, float] = defaultdict(float)
        buckets: dict[float, int] = defaultdict(int)
        rows = Counter.objects.values("name", "bucket").annotate(
            total=Sum("total"), seconds=Sum("seconds")
        )
        for row in rows:
            totals[row["name"]] += row["total"]
            if row["name"].startswith("attempts."):
                seconds["attempts"] += row["seconds"]
                buckets[row["bucket"]] += row["total"]

        yield CounterMetricFamily(
            "mailroom_accepted", "Deliveries accepted, one per recipient.", value=totals["accepted"]
        )
        attempts = CounterMetricFamily(
            "mailroom_attempts", "Attempts to send, by outcome.", labels=["outcome"]
        )
        for outcome in OUTCOMES:
            attempts.add_metric([outcome.value], totals[f"attempts.{outcome}"])
        yield attempts
        yield CounterMetricFamily(
            "mailroom_expired", "Deliveries whose deadline passed.", value=totals["expired"]
        )
        yield CounterMetricFamily(
            "mailroom_publish_failures",
            "Failed attempts of the relay to publish.",
            value=totals["publish_failures"],
        )
        yield CounterMetricFamily(
            "mailroom_republished",
            "Deliveries published again because RabbitMQ lost the confirmed message.",
            value=totals["republished"],
        )
        below, cumulated = 0, []
        for bucket in Counter.BUCKETS:
            below += buckets[bucket]
            cumulated.append((str(float(bucket)), below))
        cumulated.append(("+Inf", below + buckets[0]))
        yield HistogramMetricFamily(
            "mailroom_send_seconds",
            "Duration of an attempt.",
            buckets=cumulated,
            sum_value=seconds["attempts"],
        )

        now = dict(
            Delivery.objects.filter(state__in=UNFINISHED)
            .values_list("state")
            .annotate(Count("pk"))
            .order_by()
        )
        waiting = GaugeMetricFamily(
            "mailroom_deliveries", "Deliveries that are not finished.", labels=["state"]
        )
        for state in UNFINISHED:
            waiting.add_metric([state.value], now.get(state, 0))
        yield waiting
        yield GaugeMetricFamily(
            "mailroom_dead",
            "Failed and held deliveries, which need an operator.",
            value=Delivery.objects.filter(NEEDS_OPERATOR).count(),
        )
        queued = Delivery.objects.filter(state=State.QUEUED)
        yield GaugeMetricFamily(
            "mailroom_queue_age_seconds",
            "Age of the oldest email that is waiting for a worker.",
            value=seconds_since(queued.aggregate(at=Min("email__created_at"))["at"]),
        )
        due = Delivery.objects.filter(state__in=UNFINISHED, due_at__lte=timezone.now())
        oldest = due.aggregate(at=Min("due_at"))["at"]
        yield GaugeMetricFamily(
            "mailroom_oldest_due_seconds",
            "How long the oldest due delivery has been waiting for the relay.",
            value=seconds_since(oldest),
        )


def exposition() -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)
