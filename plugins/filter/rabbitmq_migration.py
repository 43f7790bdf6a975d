"""Adapts the definitions of an older RabbitMQ to a new broker."""

from __future__ import annotations

import json

# Policy keys of mirrored classic queues. RabbitMQ 4 has no such queues, and refuses the keys.
MIRRORED = "ha-"
# The fields that identify an object of each kind.
KEYS = ("name", "user", "component", "source", "destination", "destination_type", "routing_key", "vhost", "exchange")
# A node has its own value.
OF_THE_NODE = ("internal_cluster_id",)


def _label(kind, entry):
    words = " ".join(str(entry[key]) for key in KEYS if key in entry and key != "vhost")
    return f"{kind} {words}" + (f" in {entry['vhost']}" if "vhost" in entry else "")


def _policy(entry):
    """Return the policy without mirroring."""
    kept = {key: value for key, value in entry["definition"].items() if not key.startswith(MIRRORED)}
    return {**entry, "definition": kept}


def _is_left_out(kind, entry, administrator):
    # The role has created the administrator with its own password, and deletes guest.
    if kind == "users" and entry["name"] in ("guest", administrator):
        return True
    if kind in ("permissions", "topic_permissions") and entry["user"] in ("guest", administrator):
        return True
    if kind == "global_parameters" and entry["name"] in OF_THE_NODE:
        return True
    # RabbitMQ 4 denies transient queues. Their client declares them.
    if kind == "queues" and not entry["durable"]:
        return True
    return kind == "policies" and not entry["definition"]


def rabbitmq_migrated_definitions(exported, administrator):
    """Return the definitions that a new broker can import."""
    kinds = {kind: entries for kind, entries in exported.items() if isinstance(entries, list)}
    if "policies" in kinds:
        kinds["policies"] = [_policy(entry) for entry in kinds["policies"]]
    return {kind: [entry for entry in entries if not _is_left_out(kind, entry, administrator)] for kind, entries in kinds.items()}


def rabbitmq_not_migrated(exported, migrated):
    """Return labels of the exported objects that are left out or changed, such as "policies mirrored in shop"."""
    kinds = {kind: entries for kind, entries in exported.items() if isinstance(entries, list)}
    return [_label(kind, entry) for kind, entries in kinds.items() for entry in entries if entry not in migrated[kind]]


def rabbitmq_absent_definitions(wanted, found):
    """Return labels of the objects that a broker does not have. An object with other values counts as present."""
    return [
        _label(kind, entry)
        for kind, entries in wanted.items()
        for entry in entries
        if _label(kind, entry) not in {_label(kind, other) for other in found.get(kind, [])}
    ]


def rabbitmq_losses(results):
    """Return a sentence about the messages in the results of `rabbitmqctl list_queues`, one result per virtual host."""
    found = sorted((each["item"], queue["name"], queue["messages"]) for each in results for queue in json.loads(each["stdout"]))
    lost = [f"{messages} in {name} of {vhost}" for vhost, name, messages in found if messages]
    total = sum(messages for _, _, messages in found)
    return f"{total} messages would be lost: {', '.join(lost)}." if lost else "All queues are empty, so no message would be lost."


class FilterModule:
    def filters(self):
        return {
            "rabbitmq_absent_definitions": rabbitmq_absent_definitions,
            "rabbitmq_losses": rabbitmq_losses,
            "rabbitmq_migrated_definitions": rabbitmq_migrated_definitions,
            "rabbitmq_not_migrated": rabbitmq_not_migrated,
        }
