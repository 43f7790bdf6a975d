"""Tests the effects of `configure` on a project's Celery application."""

import pytest
from celery import Celery
from celery.utils.quorum_queues import detect_quorum_queues
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.control import Panel

from emails import celery_config, worker
from emails.celery_config import configure

CELERYS_CONSUMER = "celery.worker.consumer:Consumer"


@pytest.fixture
def shop(monkeypatch):
    """A project's application with its own tasks, without side effects on Celery."""
    # By default, the new application would become the current application for later tests.
    monkeypatch.setattr("celery.apps.worker.trace.setup_worker_optimizations", lambda *_: None)
    monkeypatch.setattr(celery_config.signals.celeryd_init, "receivers", [])
    monkeypatch.setattr(Panel, "data", Panel.data.copy())
    monkeypatch.setattr(worker, "bound_decompression", lambda: None)
    monkeypatch.setattr(worker.DelayedDelivery, "requires", worker.DelayedDelivery.requires)
    for step in (Gossip, Mingle):
        monkeypatch.setattr(step, "compatible_transports", step.compatible_transports)
    app = Celery("shop", broker="amqp://127.0.0.1:1//", set_as_current=False)
    configure(app)
    return app


@pytest.mark.parametrize("named", [None, "celery", ["celery", "reports"]])
def test_workers_of_other_queues_are_not_changed(shop, named):
    commands = set(Panel.data)
    started = shop.Worker(queues=named)
    assert started.consumer_cls == CELERYS_CONSUMER
    assert "mail.v1" not in shop.amqp.queues
    assert set(Panel.data) == commands
    assert Mingle.compatible_transports


@pytest.mark.parametrize("named", ["mail.v1", "mail.v1,maintenance.v1", ["celery", "mail.v1"]])
def test_worker_of_a_queue_of_this_app_is_prepared(shop, named):
    started = shop.Worker(queues=named)
    assert started.consumer_cls == "emails.worker:Consumer"
    assert set(Panel.data) == worker.CONTROL_COMMANDS
    assert not Mingle.compatible_transports and not Gossip.compatible_transports
    assert shop.amqp.queues["mail.v1"].queue_arguments == {"x-queue-type": "quorum"}
    assert shop.amqp.queues["mail.v1"].exchange.type == "topic"


def test_publishers_of_the_project_have_no_quorum_queue(shop):
    """With a quorum queue, Celery would log a warning for each of the project's eta tasks."""
    assert set(shop.amqp.queues) == {"celery"}
    assert detect_quorum_queues(shop, "amqp") == (False, "")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("config", "namespace"),
    [({"broker_heartbeat": 10}, None), ({"CELERY_BROKER_HEARTBEAT": 10}, "CELERY")],
)
def test_project_settings_override_defaults(shop, loaded, config, namespace):
    app = Celery("shop", set_as_current=False)
    app.config_from_object(config, namespace=namespace)
    if loaded:
        assert app.conf.task_publish_retry is True
    configure(app)
    assert app.conf.broker_heartbeat == 10
    assert app.conf.task_publish_retry is False
    assert app.conf.task_default_queue == "celery"
