import json
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from django.core.management import call_command
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from emails import deliveries, tasks
from emails.models import Email
from emails.relay import Relay
from emails.states import State
from tests.tools import claim, end

pytestmark = pytest.mark.django_db


@pytest.fixture
def metrics(client, settings):
    settings.EMAILS_METRICS_TOKEN = "a-token"

    def metrics() -> dict[str, float]:
        response = client.get("/metrics", headers={"Authorization": "Bearer a-token"})
        assert response.status_code == 200
        text = response.content.decode()
        assert "example.org" not in text
        return {
            "".join((sample.name, *(f" {value}" for value in sample.labels.values()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return metrics


def test_counts_each_recipient_of_every_email(accept, metrics):
    accept()
    accept(recipients=["bob@example.org", "eve@example.org"])
    assert metrics()["mailroom_accepted_total"] == 3


def test_counts_outcomes_and_keeps_them_after_the_purge(accept, mailbox, metrics):
    email = accept(recipients=["bob@example.org", "eve@example.org"])
    assert metrics()["mailroom_accepted_total"] == 2
    first, second = email.deliveries.all()
    tasks.deliver(first.pk)
    mailbox.recipient_reply = "550 no such user"
    tasks.deliver(second.pk)
    found = metrics()
    assert found["mailroom_attempts_total sent"] == found["mailroom_attempts_total failed"] == 1
    assert found["mailroom_attempts_total uncertain"] == 0
    assert found["mailroom_send_seconds_count"] == found["mailroom_send_seconds_bucket +Inf"] == 2
    assert found["mailroom_send_seconds_sum"] > 0
    assert found["mailroom_dead"] == 1

    Email.objects.update(created_at=timezone.now() - timedelta(days=31))
    tasks.purge()
    assert not Email.objects.exists()
    found = metrics()
    assert found["mailroom_accepted_total"] == 2
    assert found["mailroom_attempts_total sent"] == 1
    assert found["mailroom_dead"] == 0


def test_reports_waiting_deliveries_and_their_age(accept, metrics):
    assert metrics()["mailroom_oldest_due_seconds"] == metrics()["mailroom_queue_age_seconds"] == 0
    earlier = timezone.now() - timedelta(minutes=10)
    for state in (State.QUEUED, State.QUEUED, State.DEFERRED):
        accept().deliveries.update(state=state, due_at=earlier)
    Email.objects.update(created_at=earlier)
    found = metrics()
    assert found["mailroom_deliveries queued"] == 2
    assert found["mailroom_deliveries deferred"] == 1
    assert 600 <= found["mailroom_queue_age_seconds"] < 660
    assert 600 <= found["mailroom_oldest_due_seconds"] < 660
    deliveries.lease(9)
    assert metrics()["mailroom_oldest_due_seconds"] == 0


def test_counts_attempt_in_its_bucket(accept, metrics):
    durations = (0.01, 0.3, 0.3, 500)
    for seconds in durations:
        claimed = claim(accept().deliveries.get())
        end(claimed, State.SENT, code=250, answer="", seconds=seconds)
    found = metrics()
    buckets = [
        found[f"mailroom_send_seconds_bucket {le}"] for le in ("0.05", "0.25", "0.5", "+Inf")
    ]
    assert buckets == [1, 1, 3, 4]
    assert found["mailroom_send_seconds_sum"] == pytest.approx(sum(durations))


def test_counts_failed_publications(delivery, metrics, monkeypatch):
    # The thread uses the test's connection, within the test's transaction.
    monkeypatch.setattr("emails.relay.close_old_connections", lambda: None)
    monkeypatch.setattr("emails.relay.connection", Mock())
    relay = Relay()

    class Refused:
        def publish_due(self):
            relay.stop()
            raise ConnectionRefusedError

        def discard_connection(self):
            pass

    relay._publish(Refused())
    assert metrics()["mailroom_publish_failures_total"] == 1


def test_metrics_require_the_token(client, settings):
    assert client.get("/metrics").status_code == 404
    settings.EMAILS_METRICS_TOKEN = "a-token"
    for given in ("", "Bearer wrong", "a-token", "Bearer \u00fc"):
        assert client.get("/metrics", headers={"Authorization": given}).status_code == 401


def test_email_status_reports_states_and_ages(accept, capsys):
    def status() -> Any:
        call_command("email_status")
        return json.loads(capsys.readouterr().out)

    assert status()["oldest_unsent_seconds"] == status()["needs_operator"] == 0
    earlier = timezone.now() - timedelta(hours=2)
    for state, due in (
        (State.QUEUED, earlier),
        (State.SENT, None),
        (State.FAILED, None),
        # A held delivery and a scheduled one are older, and don't wait for a worker.
        (State.UNCERTAIN, None),
        (State.SCHEDULED, timezone.now() + timedelta(hours=1)),
    ):
        accept().deliveries.update(state=state, due_at=due)
    Email.objects.update(created_at=timezone.now() - timedelta(hours=20))
    Email.objects.filter(deliveries__state=State.QUEUED).update(created_at=earlier)
    accept()
    found = status()
    assert {state: number for state, number in found["states"].items() if number} == {
        "queued": 2,
        "sent": 1,
        "failed": 1,
        "uncertain": 1,
        "scheduled": 1,
    }
    assert found["needs_operator"] == 2
    assert 7200 <= found["oldest_unsent_seconds"] < 7260
    assert 7200 <= found["oldest_due_seconds"] < 7260
    Email.objects.update(created_at=timezone.now() - timedelta(hours=25))
    assert set(status()["states"].values()) == {0}
