"""The comparison of definitions that restore_rabbitmq.yml ends with."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.filter.rabbitmq_definitions import rabbitmq_missing_definitions

WANTED = {
    "users": [{"name": "shop", "password_hash": "a", "tags": []}],
    "permissions": [{"user": "shop", "vhost": "v", "read": ".*"}],
    "queues": [{"name": "mail", "vhost": "v", "arguments": {"x": 1}}, {"name": "dead", "vhost": "v", "arguments": {}}],
    "bindings": [{"source": "emails", "vhost": "v", "destination": "mail"}],
}


def test_the_same_objects_in_another_order_are_complete():
    found = {kind: [*reversed(entries), {"name": "another"}] for kind, entries in reversed(WANTED.items())}
    assert rabbitmq_missing_definitions(WANTED, {**found, "policies": []}) == []


def test_objects_that_are_missing_or_differ_are_named():
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
