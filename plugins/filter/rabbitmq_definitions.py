"""Compares exported definitions of RabbitMQ brokers."""

from __future__ import annotations


def _label(kind, entry):
    # Permissions have a user, bindings have a source; all other objects have a name.
    name = next(entry[key] for key in ("name", "user", "source") if key in entry)
    return f"{kind} {name}" + (f" in {entry['vhost']}" if "vhost" in entry else "")


def rabbitmq_missing_definitions(wanted, found):
    """Return labels for objects in `wanted` that are missing or different in `found`, such as "queues mail.v1 in mailroom"."""
    return [_label(kind, entry) for kind, entries in wanted.items() for entry in entries if entry not in found.get(kind, [])]


class FilterModule:
    def filters(self):
        return {"rabbitmq_missing_definitions": rabbitmq_missing_definitions}
