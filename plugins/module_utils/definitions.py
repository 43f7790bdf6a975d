"""Compares the definitions of a RabbitMQ broker with the objects in the role's variables.

This file sends no requests. `compare` takes exported definitions and returns the objects to import and to delete.
KINDS describes each kind of object.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional
from urllib.parse import quote

from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked
from ansible_collections.django_celery.stack.plugins.module_utils.password_hash import (
    NEW_HASHES,
    password_hash,
    password_matches,
)

# An object from the variables or the definitions, or a part of it: field names and their values.
Object = dict[str, Any]

# RabbitMQ creates this user with a known password. The role always deletes it.
GUEST = "guest"

# Marks a field without a default, which the variables must set.
REQUIRED: Any = object()


def api_path(*parts: str) -> str:
    """Return a path below /api of the management API. Names may contain slashes and spaces."""
    return "/".join(quote(part, safe="") for part in parts)


def pick(entry: Object, fields: Mapping[str, Any]) -> Object:
    """Return the fields of an entry, with defaults for missing fields. A required field must exist."""
    return {name: entry[name] if default is REQUIRED else entry.get(name) or default for name, default in fields.items()}


def as_text(key: Object) -> dict[str, str]:
    """Convert the parts of a key to strings, so that keys with mappings can be looked up and printed."""
    return {name: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for name, value in key.items()}


@dataclass(frozen=True)
class Kind:
    """A kind of object: its fields, and how its objects are compared and deleted."""

    # The format of an object's title in messages. It contains the keys.
    title: str
    # The list in the definitions that contains the objects.
    section: str
    # The fields that identify an object, with their defaults.
    keys: Mapping[str, Any]
    # The fields that are compared, with their defaults.
    values: Mapping[str, Any]
    # Returns the objects that the variables list.
    listed: Callable[[Mapping[str, Any]], Iterable[Object]]
    # Keys that are the same for all objects of the kind. The section may contain other kinds too.
    constant: Mapping[str, str] = field(default_factory=dict)
    # Returns the values of an object in the broker. The second argument, the wanted values, is needed to compare passwords.
    read: Callable[[Object, Object], Object] = lambda actual, wanted: {name: actual.get(name) for name in wanted}
    # A missing object is treated as an object with these values. If this is None, a missing object must be created.
    absent: Optional[Object] = None
    # Returns the values to import with the key. Its arguments are the wanted values and the broker's object, if it exists.
    to_import: Callable[[Object, Optional[Object]], Object] = lambda wanted, actual: wanted
    # Returns the values for printing.
    shown: Callable[[Object], Any] = lambda values: values
    # Returns API paths to delete after the import, since an import does not remove these parts of an object.
    left_over: Callable[[Object, Object, Object], list[str]] = lambda key, wanted, actual: []
    # The API path of an object, as formats that contain its keys. If a kind has no path, a purge keeps its objects.
    path: tuple[str, ...] = ()
    # The text in the diff for an object that a purge deletes. If it is None, the diff shows the object's values.
    purged: Optional[str] = None
    # Whether an import changes an existing object. RabbitMQ answers 204 even if the import changes nothing.
    changeable: bool = True

    def key(self, entry: Object) -> Object:
        return pick(entry, self.keys)

    def name(self, key: Object) -> str:
        return self.title.format(**as_text(key))

    def index(self, entries: Iterable[Object]) -> dict[tuple[str, ...], Object]:
        """Return a section's entries of this kind, by their keys."""
        return {
            tuple(as_text(self.key(entry)).values()): entry
            for entry in entries
            if all(entry[name] == value for name, value in self.constant.items())
        }

    def wanted(self, variables: Mapping[str, Any]) -> dict[tuple[str, ...], Object]:
        """Return the objects that the variables list, by their keys."""
        return self.index({**entry, **self.constant} for entry in self.listed(variables))


def lists(name: str) -> Callable[[Mapping[str, Any]], Iterable[Object]]:
    """Return a function that reads one list in the variables. The list may be missing."""
    return lambda variables: variables.get(name) or []


def permissions(name: str) -> Callable[[Mapping[str, Any]], Iterable[Object]]:
    """Return a function that concatenates one list of all users, and adds the user to each entry."""
    return lambda variables: [
        {**entry, "user": user["name"]} for user in variables.get("users") or [] for entry in user.get(name) or []
    ]


def users(variables: Mapping[str, Any]) -> list[Object]:
    return [{**user, "tags": sorted(user.get("tags") or [])} for user in variables.get("users") or []]


def vhost_limits(variables: Mapping[str, Any]) -> list[Object]:
    return [{"vhost": vhost["name"], "value": vhost.get("limits")} for vhost in variables.get("vhosts") or []]


def policies(variables: Mapping[str, Any]) -> list[Object]:
    return [{**policy, "apply-to": policy.get("apply_to")} for policy in variables.get("policies") or []]


def operator_policies(variables: Mapping[str, Any]) -> list[Object]:
    return [
        {"vhost": policy["vhost"], "name": policy["name"], "value": pick({**policy, "apply-to": policy.get("apply_to")}, POLICY)}
        for policy in variables.get("operator_policies") or []
    ]


def queues(variables: Mapping[str, Any]) -> list[Object]:
    return [
        {**queue, "arguments": {**(queue.get("arguments") or {}), "x-queue-type": queue.get("type") or "quorum"}}
        for queue in variables.get("queues") or []
    ]


def read_vhost(actual: Object, wanted: Object) -> Object:
    """Older brokers export the fields next to the metadata, newer ones in the metadata."""
    metadata = actual.get("metadata") or {}
    return {name: actual.get(name) or metadata.get(name) or "" for name in wanted}


def import_vhost(wanted: Object, actual: Optional[Object]) -> Object:
    """The import replaces the metadata, so values that the variables do not set are copied from the broker."""
    actual = actual or {}
    return {**actual, **wanted, "metadata": {**(actual.get("metadata") or {}), **wanted}}


def user_tags(user: Object) -> list[str]:
    """Return the sorted tags of a broker's user. Older brokers export the tags as one string, separated by commas."""
    tags = user.get("tags") or []
    return sorted(tags.split(",")) if isinstance(tags, str) else sorted(tags)


def read_user(actual: Object, wanted: Object) -> Object:
    """The broker has only a hash. If the hash does not match the wanted password, the broker's password is unknown."""
    password = wanted["password"] if password_matches(wanted["password"], actual) else None
    return {"tags": user_tags(actual), "limits": actual.get("limits") or {}, "password": password}


def import_user(wanted: Object, actual: Optional[Object]) -> Object:
    """A matching hash is kept, so that the hash does not change with the tags."""
    if actual is not None and password_matches(wanted["password"], actual):
        hashed = {name: actual[name] for name in ("password_hash", "hashing_algorithm")}
    else:
        hashed = {"password_hash": password_hash(wanted["password"]), "hashing_algorithm": NEW_HASHES}
    return {"tags": wanted["tags"], "limits": wanted["limits"], **hashed}


def left_over_limits(key: Object, wanted: Object, actual: Object) -> list[str]:
    """An import adds and changes limits of a user, but does not remove limits."""
    return [api_path("user-limits", key["name"], limit) for limit in actual["limits"] if limit not in wanted["limits"]]


POLICY = {"pattern": REQUIRED, "apply-to": "all", "priority": 0, "definition": REQUIRED}

KINDS = {
    "vhosts": Kind(
        title="vhost {name}",
        section="vhosts",
        keys={"name": REQUIRED},
        values={"description": "", "default_queue_type": "quorum"},
        listed=lists("vhosts"),
        read=read_vhost,
        to_import=import_vhost,
        path=("vhosts", "{name}"),
        purged="with its contents",
    ),
    "vhost_limits": Kind(
        title="limits of vhost {vhost}",
        section="parameters",
        constant={"component": "vhost-limits", "name": "limits"},
        keys={"component": REQUIRED, "vhost": REQUIRED, "name": REQUIRED},
        values={"value": {}},
        listed=vhost_limits,
        # If a user's limits were cleared, the broker exports an empty list.
        read=lambda actual, wanted: {"value": actual["value"] or {}},
        absent={"value": {}},
    ),
    "users": Kind(
        title="user {name}",
        section="users",
        keys={"name": REQUIRED},
        values={"tags": [], "limits": {}, "password": REQUIRED},
        listed=users,
        read=read_user,
        to_import=import_user,
        shown=lambda values: {**values, "password": "another" if values["password"] is None else "as wanted"},
        left_over=left_over_limits,
        path=("users", "{name}"),
        purged="not listed",
    ),
    "permissions": Kind(
        title="permissions of {user} in {vhost}",
        section="permissions",
        keys={"user": REQUIRED, "vhost": REQUIRED},
        values={"configure": "", "write": "", "read": ""},
        listed=permissions("permissions"),
        path=("permissions", "{vhost}", "{user}"),
    ),
    "topic_permissions": Kind(
        title="topic permissions of {user} on {exchange} in {vhost}",
        section="topic_permissions",
        keys={"user": REQUIRED, "vhost": REQUIRED, "exchange": REQUIRED},
        values={"write": "", "read": ""},
        listed=permissions("topic_permissions"),
        path=("topic-permissions", "{vhost}", "{user}", "{exchange}"),
    ),
    "policies": Kind(
        title="policy {name} in {vhost}",
        section="policies",
        keys={"vhost": REQUIRED, "name": REQUIRED},
        values=POLICY,
        listed=policies,
        path=("policies", "{vhost}", "{name}"),
    ),
    "operator_policies": Kind(
        title="operator policy {name} in {vhost}",
        section="parameters",
        constant={"component": "operator_policy"},
        keys={"component": REQUIRED, "vhost": REQUIRED, "name": REQUIRED},
        values={"value": REQUIRED},
        listed=operator_policies,
        read=lambda actual, wanted: {"value": {name: actual["value"].get(name) for name in POLICY}},
        path=("operator-policies", "{vhost}", "{name}"),
    ),
    "parameters": Kind(
        title="{component} {name} in {vhost}",
        section="parameters",
        keys={"component": REQUIRED, "vhost": REQUIRED, "name": REQUIRED},
        values={"value": REQUIRED},
        listed=lists("parameters"),
    ),
    "global_parameters": Kind(
        title="global parameter {name}",
        section="global_parameters",
        keys={"name": REQUIRED},
        values={"value": REQUIRED},
        listed=lists("global_parameters"),
    ),
    "exchanges": Kind(
        title="exchange {name} in {vhost}",
        section="exchanges",
        keys={"vhost": REQUIRED, "name": REQUIRED},
        values={"type": "topic", "durable": True, "auto_delete": False, "internal": False, "arguments": {}},
        listed=lists("exchanges"),
        changeable=False,
    ),
    "queues": Kind(
        title="queue {name} in {vhost}",
        section="queues",
        keys={"vhost": REQUIRED, "name": REQUIRED},
        values={"durable": True, "auto_delete": False, "arguments": {}},
        listed=queues,
        # A queue without the argument is a classic queue.
        read=lambda actual, wanted: {
            "durable": actual.get("durable"),
            "auto_delete": actual.get("auto_delete"),
            "arguments": {"x-queue-type": "classic", **(actual.get("arguments") or {})},
        },
        changeable=False,
    ),
    "bindings": Kind(
        title="binding of {destination_type} {destination} to {source} in {vhost} by {routing_key!r} {arguments}",
        section="bindings",
        keys={
            "vhost": REQUIRED,
            "source": REQUIRED,
            "destination_type": "queue",
            "destination": REQUIRED,
            "routing_key": "",
            "arguments": {},
        },
        # All fields are keys, since a binding with another routing key is another binding.
        values={},
        listed=lists("bindings"),
    ),
}


@dataclass(frozen=True)
class Purge:
    """The objects that a purge may delete: all unlisted objects except this administrator, and of the virtual hosts only these."""

    administrator: str
    vhosts: Collection[str] = ()

    def spares(self, kind: str, key: Object, listed_users: Collection[str]) -> bool:
        if kind == "vhosts":
            return key["name"] not in self.vhosts
        if kind == "users":
            return key["name"] in (self.administrator, GUEST)
        # RabbitMQ deletes permissions with their user, and the contents of a virtual host with the virtual host.
        return key["vhost"] in self.vhosts or ("user" in key and key["user"] not in listed_users)


@dataclass
class Difference:
    """The changes to a broker. Its truth value is false if nothing changes.

    to_import: definitions, a list of objects per section.
    to_delete: paths below /api to delete after the import.
    before, after: titles of objects, each with readable values without passwords. None means that the object does not exist.
    conflicts: an error message for each object that exists with other values and cannot be changed.
    """

    to_import: dict[str, list[Object]] = field(default_factory=dict)
    to_delete: list[str] = field(default_factory=list)
    before: Object = field(default_factory=dict)
    after: Object = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.after)

    def note(self, name: str, before: Any, after: Any) -> None:
        self.before[name], self.after[name] = masked(before), masked(after)

    def update(self, kind: Kind, wanted: Object, actual: Optional[Object]) -> None:
        """Add the changes that make the broker's object, if it exists, equal to the wanted object."""
        key, values = kind.key(wanted), pick(wanted, kind.values)
        existing = kind.absent if actual is None else kind.read(actual, values)
        if existing == values:
            return
        name = kind.name(key)
        if actual is not None and existing is not None and not kind.changeable:
            different = [field for field in values if existing[field] != values[field]]
            self.conflicts.append(
                f"{name} exists with {json.dumps({field: existing[field] for field in different})} "
                f"and can't be changed to {json.dumps({field: values[field] for field in different})}"
            )
            return
        self.to_import.setdefault(kind.section, []).append({**key, **kind.to_import(values, actual)})
        self.note(name, None if existing is None else kind.shown(existing), kind.shown(values))
        if existing is not None:
            self.to_delete += kind.left_over(key, values, existing)

    def delete(self, kind: Kind, key: Object, before: Any) -> None:
        self.to_delete.append(api_path(*(part.format(**as_text(key)) for part in kind.path)))
        self.note(kind.name(key), before, None)


def compare(actual: Mapping[str, Any], variables: Mapping[str, Any], purge: Optional[Purge] = None) -> Difference:
    """Return the difference between exported definitions and the lists in the variables, such as `vhosts` and `users`.

    An unlisted object is kept, unless `purge` deletes it.
    """
    found = Difference()
    existing = {name: kind.index(actual.get(kind.section) or []) for name, kind in KINDS.items()}
    wanted = {name: kind.wanted(variables) for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        for key, entry in wanted[name].items():
            found.update(kind, entry, existing[name].get(key))
    guest = existing["users"].get((GUEST,))
    if guest is not None:
        found.delete(KINDS["users"], {"name": GUEST}, {"tags": user_tags(guest)})
    if purge is None:
        return found
    listed_users = {entry["name"] for entry in wanted["users"].values()}
    for name, kind in KINDS.items():
        for key, entry in sorted(existing[name].items(), key=lambda item: item[0]):
            if kind.path and key not in wanted[name] and not purge.spares(name, kind.key(entry), listed_users):
                found.delete(kind, kind.key(entry), kind.purged or pick(entry, kind.values))
    return found
