"""Tests the comparison of definitions at the end of restore_rabbitmq.yml."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.filter.rabbitmq_definitions import rabbitmq_missing_definitions

WANTED = {
    "users": [{"name": "shop", "password_hash": "a", "tags": []}],
    "permissions": [{"user": "shop", "vhost": "v", "read": ".*"}],
    "queues": [{"name": "mail", "vhost": "v", "arguments": {"x": 1}}, {"name": "dead", "vhost": "v", "arguments": {}}],
    "bindings": [{"source": "emails", "vhost": "v", "destination": "mail"}],
}


def test_order_of_objects_does_not_matter():
    found = {kind: [*reversed(entries), {"name": "another"}] for kind, entries in reversed(WANTED.items())}
    assert rabbitmq_missing_definitions(WANTED, {**found, "policies": []}) == []


def test_missing_and_different_objects_are_named():
    found = {
        "users": [{"name": "shop", "password_hash": "b", "tags": []}],
        "permissions": [{"user": "shop", "vhost": "w", "read": ".*"}],
        "queues": [WANTED["queues"][1]],
    }
    assert rabbitmq_missing_definitions(WANTED, found) == [
        "users shop",
        "permissions shop in v",
        "queues mail in v",
        "bindings emails in v",
    ]
