"""Imports the objects in the role's variables into a RabbitMQ broker, and reads the definitions before and after it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Optional

from ansible_collections.django_celery.stack.plugins.module_utils.definitions import (
    Difference,
    Object,
    Purge,
    api_path,
    compare,
)
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import ManagementApi, Unauthorized
from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked, uri_passwords
from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_upgrade import (
    current_machine_version,
    disabled_flags,
    old_queues,
    quorum_statuses,
)

# Exchanges that RabbitMQ creates in each virtual host.
BUILT_IN = re.compile(r"$|amq\.")

# Time limits in seconds: until an import is visible on this node, until quorum queues have the machine version of an upgraded
# node, and until rabbitmqctl exits.
VISIBLE = 5
CURRENT = 60
RABBITMQCTL = 120


def contents(queues: Iterable[Object], exchanges: Iterable[Object], connections: Iterable[Object]) -> list[str]:
    """Return the contents of a virtual host, such as `2 queues`. If the virtual host is empty, the list is empty."""
    queues = list(queues)
    # An unavailable queue has no message count.
    messages = sum(queue.get("messages") or 0 for queue in queues)
    declared = [exchange for exchange in exchanges if not BUILT_IN.match(exchange["name"])]
    parts = {"queues": len(queues), "messages": messages, "exchanges": len(declared), "connections": len(list(connections))}
    return [f"{count} {what}" for what, count in parts.items() if count]


class Broker:
    """One node of a broker, and the variables that list its objects.

    `add_secrets` is called with passwords that Ansible must not print.
    """

    def __init__(self, variables: Mapping[str, Any], check: bool, add_secrets: Callable[[set[str]], None]) -> None:
        self.variables = variables
        self.check = check
        self.add_secrets = add_secrets
        self.administrator = variables["administrator"]
        # Check mode does not start the broker, so it does not wait for the broker.
        timeout = 0 if check else variables["timeout"]
        self.api = ManagementApi(variables["url"], self.administrator, variables["password"], timeout, variables.get("ca_file"))

    def update(self) -> dict[str, Any]:
        """Update the broker to match the variables, or in check mode report the changes. Return the module's result.

        Raises NoAnswer if the API does not answer, and Failure for other errors.
        """
        before: Object = {}
        after: Object = {}
        try:
            actual = self.api.get("definitions")
        except Unauthorized:
            name = f"user {self.administrator}"
            before[name], after[name] = {"password": "another"}, {"password": "as wanted"}
            if self.check:
                return {"changed": True, "removed": [], "kept": [], "diff": {"before": before, "after": after}}
            self.set_administrator()
            actual = self.read_as_new_administrator()
        self.add_secrets(uri_passwords([actual.get("parameters"), actual.get("global_parameters")]))
        flags = disabled_flags(self.api.get("feature-flags"))
        purge, kept = self.purge(actual) if self.variables["purge"] else (None, [])
        found = compare(actual, self.variables, purge)
        if found.conflicts:
            raise Failure(
                f"{'; '.join(found.conflicts)}. Delete it once it is empty, list it with its existing values, or use another name."
            )
        before.update(found.before)
        after.update(found.after)
        for flag in flags:
            before[f"feature flag {flag}"], after[f"feature flag {flag}"] = "disabled", "enabled"
        if not self.check:
            if flags:
                self.require_current_queues(flags)
            for flag in flags:
                self.api.put(api_path("feature-flags", flag, "enable"), {})
            if found:
                self.apply(found)
                self.verify(purge)
        removed = [name for name, value in after.items() if value is None]
        return {"changed": bool(after), "removed": removed, "kept": kept, "diff": {"before": before, "after": after}}

    def set_administrator(self) -> None:
        """Import the administrator from the bootstrap definitions. rabbitmqctl authenticates with the Erlang cookie."""
        command = ["rabbitmqctl", "--quiet", "import_definitions", self.variables["definitions"]]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RABBITMQCTL, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(f"rabbitmqctl can't set the administrator: {error}") from None
        if done.returncode:
            raise Failure(masked(f"rabbitmqctl can't set the administrator: {done.stderr.strip() or done.stdout.strip()}"))

    def read_as_new_administrator(self) -> Object:
        try:
            definitions: Object = self.api.get("definitions")
        except Unauthorized:
            raise Failure(f"RabbitMQ rejects {self.administrator} even after its password was set.") from None
        return definitions

    def require_current_queues(self, flags: list[str]) -> None:
        """Wait until each quorum queue has the node's machine version. Raises Failure if one keeps an older version.

        With the flag `rabbitmq_4.0.0`, a queue of machine version 3 crashes, and confirms messages that it discards
        (rabbitmq-server#17504).
        """
        current = current_machine_version()
        until = time.monotonic() + CURRENT
        while old := old_queues(quorum_statuses(self.api), current):
            if time.monotonic() > until:
                raise Failure(
                    f"The feature flags {', '.join(flags)} are not enabled, because quorum queues have a member that has an "
                    f"old machine version or does not answer: {', '.join(old)}. Restart the node of each queue's leader, and run "
                    "the playbook again."
                )
            time.sleep(1)

    def purge(self, actual: Object) -> tuple[Purge, list[str]]:
        """Return the objects to delete, and a message for each unlisted virtual host that is kept.

        An unlisted virtual host is deleted if it is empty or in `purge_vhosts`.
        """
        listed, named = {vhost["name"] for vhost in self.variables["vhosts"]}, set(self.variables["purge_vhosts"])
        unlisted = {vhost["name"] for vhost in actual["vhosts"]} - listed
        held = {vhost: self.contents(vhost) for vhost in sorted(unlisted - named)}
        kept = [f"vhost {vhost} is not listed and stays: it has {', '.join(parts)}." for vhost, parts in held.items() if parts]
        return Purge(self.administrator, {vhost for vhost in unlisted if not held.get(vhost)}), kept

    def contents(self, vhost: str) -> list[str]:
        return contents(
            self.api.get(f"{api_path('queues', vhost)}?disable_stats=true&enable_queue_totals=true"),
            self.api.get(api_path("exchanges", vhost)),
            self.api.get(api_path("vhosts", vhost, "connections")),
        )

    def apply(self, difference: Difference) -> None:
        """Import objects before deleting others, so that a replacement exists before the old object is deleted."""
        if difference.to_import:
            self.api.post("definitions", difference.to_import)
        for path in difference.to_delete:
            self.api.delete(path)

    def verify(self, purge: Optional[Purge]) -> None:
        """Read the definitions until nothing differs.

        An import silently ignores objects that it can't create. Other nodes may apply the import later.
        """
        until = time.monotonic() + VISIBLE
        while True:
            left = compare(self.api.get("definitions"), self.variables, purge)
            if not left:
                return
            if time.monotonic() > until:
                raise Failure(
                    f"RabbitMQ accepted the definitions, but these objects still differ: {', '.join(left.after)}. "
                    "A transient or exclusive queue or exchange of that name may exist."
                )
            time.sleep(0.5)
