"""A model of a RabbitMQ broker: its definitions after an import, and after a request that deletes an object."""

from __future__ import annotations

import base64
import copy
import hashlib
from urllib.parse import unquote


def hash_of(password, algorithm="sha256", salt=b"salt"):
    return base64.b64encode(salt + hashlib.new(algorithm, salt + password.encode()).digest()).decode()


KEYS = {
    "vhosts": ("name",),
    "users": ("name",),
    "permissions": ("user", "vhost"),
    "topic_permissions": ("user", "vhost", "exchange"),
    "policies": ("vhost", "name"),
    "parameters": ("component", "vhost", "name"),
    "global_parameters": ("name",),
    "exchanges": ("vhost", "name"),
    "queues": ("vhost", "name"),
    "bindings": ("vhost", "source", "destination", "destination_type", "routing_key"),
}
# An import does not change existing objects of these kinds. RabbitMQ 4.0.5 returns 204 nevertheless.
FIRST_STAYS = ("exchanges", "queues")


def imported(actual, sent):
    """The definitions after an import. An imported object replaces the object with the same key. Other objects stay."""
    result = copy.deepcopy(actual)
    for kind, keys in KEYS.items():
        found = {tuple(entry[key] for key in keys): entry for entry in result.get(kind, [])}
        for entry in copy.deepcopy(sent.get(kind, [])):
            key = tuple(entry[name] for name in keys)
            if kind == "users" and key in found:
                # RabbitMQ 4.0.5 adds imported limits to the user's existing limits.
                entry["limits"] = {**found[key]["limits"], **entry["limits"]}
            if kind == "parameters" and entry["component"] == "vhost-limits":
                # Removed limits are exported as an empty list.
                entry["value"] = entry["value"] or []
            if kind not in FIRST_STAYS or key not in found:
                found[key] = entry
        result[kind] = list(found.values())
    return result


def deleted(actual, below):
    """The definitions after a DELETE. The objects of a deleted virtual host or user are deleted too."""
    what, *names = map(unquote, below.split("/"))
    result = copy.deepcopy(actual)

    def drop(kind, **fields):
        result[kind] = [entry for entry in result.get(kind, []) if any(entry.get(name) != fields[name] for name in fields)]

    if what == "vhosts":
        drop("vhosts", name=names[0])
        for kind in KEYS:
            if "vhost" in KEYS[kind]:
                drop(kind, vhost=names[0])
    elif what == "users":
        drop("users", name=names[0])
        drop("permissions", user=names[0])
        drop("topic_permissions", user=names[0])
    elif what == "user-limits":
        for user in result["users"]:
            if user["name"] == names[0]:
                user["limits"].pop(names[1], None)
    elif what == "permissions":
        drop("permissions", vhost=names[0], user=names[1])
    elif what == "topic-permissions":
        drop("topic_permissions", vhost=names[0], user=names[1], exchange=names[2])
    elif what == "policies":
        drop("policies", vhost=names[0], name=names[1])
    else:
        assert what == "operator-policies"
        drop("parameters", component="operator_policy", vhost=names[0], name=names[1])
    return result
