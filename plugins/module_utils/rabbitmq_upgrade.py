"""Finds the reasons against an upgrade of RabbitMQ: the installed version, the data on the disk, the running broker."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from ansible_collections.django_celery.stack.plugins.module_utils.definitions import api_path
from ansible_collections.django_celery.stack.plugins.module_utils.host_state import run_command
from ansible_collections.django_celery.stack.plugins.module_utils.management_api import ManagementApi
from ansible_collections.django_celery.stack.plugins.module_utils.rabbitmq_versions import (
    Row,
    begins,
    compatibility,
    release,
    series,
)

Object = Mapping[str, Any]

# The playbook for brokers that can't be upgraded with their data.
MIGRATE = "playbooks/ops/migrate_rabbitmq.yml"


def enabled_flags(text: str) -> set[str]:
    """Return the feature flags in the text of a node's file NAME-feature_flags, an Erlang list of atoms."""
    return {quoted or plain for quoted, plain in re.findall(r"'([^']+)'|([a-z]\w*)", text)}


def flags_of_data(directory: str) -> Optional[set[str]]:
    """Return the feature flags that are enabled in the data of each node in a directory. Return None if there is no such data."""
    files = list(Path(directory).glob("*-feature_flags"))
    found = [enabled_flags(file.read_text()) for file in files]
    return set.intersection(*found) if found else None


def missing_flags(required: Mapping[str, Sequence[str]], version: str, enabled: Iterable[str]) -> list[str]:
    """Return the feature flags that a version requires and the data lacks."""
    return sorted(set(required.get(series(version), [])) - set(enabled))


def data_refusal(required: Mapping[str, Sequence[str]], version: str, enabled: Optional[set[str]]) -> str:
    """Return why this version does not start with the data, or an empty string."""
    missing = [] if enabled is None else missing_flags(required, version, enabled)
    if not missing:
        return ""
    return (
        f"The data of the node is from an older RabbitMQ. RabbitMQ {version} does not start with it, because it lacks the required "
        f"feature flags {', '.join(missing)}. {MIGRATE} keeps the data, and starts an empty broker with its definitions."
    )


def path_refusal(paths: Mapping[str, Sequence[str]], installed: str, wanted: str) -> str:
    """Return why no upgrade leads from the installed version to the wanted one, or an empty string."""
    if release(wanted) < release(installed):
        return (
            f"RabbitMQ {installed} is installed, and rabbitmq_version is {wanted}. An older RabbitMQ can't read the data of a "
            f"newer one. Set rabbitmq_version to {series(installed)}."
        )
    allowed = paths.get(series(wanted), [])
    if series(installed) in allowed:
        return ""
    return (
        f"RabbitMQ {installed} is installed, and rabbitmq_version is {wanted}, which can read the data of {', '.join(allowed)} "
        f"only. Upgrade through the series between them, or use {MIGRATE}, which keeps the definitions and no messages."
    )


def erlang_refusal(table: Sequence[Row], installed: str, erlang: str) -> str:
    """Return why the installed RabbitMQ does not run on the wanted Erlang until its own upgrade, or an empty string."""
    if compatibility(table, installed, erlang) != "refused":
        return ""
    return (
        f"RabbitMQ {installed} is installed, which does not run on Erlang {erlang} (rabbitmq_erlang_version). First upgrade "
        "RabbitMQ with the installed Erlang, then upgrade Erlang."
    )


def flags_refusal(required: Mapping[str, Sequence[str]], installed: str, wanted: str, enabled: Optional[set[str]]) -> str:
    """Return why the flags in the data prevent the upgrade, or an empty string."""
    if enabled is None:
        return ""
    if series(installed) == "3.13" and "khepri_db" in enabled:
        return (
            "RabbitMQ 3.13 has the feature flag khepri_db enabled. RabbitMQ 4 can't read this data. "
            f"{MIGRATE} keeps the definitions and no messages."
        )
    missing = missing_flags(required, wanted, enabled)
    if not missing:
        return ""
    return (
        f"RabbitMQ {wanted} requires the feature flags {', '.join(missing)}, which RabbitMQ {installed} has not enabled. Run "
        "`rabbitmqctl enable_feature_flag all`."
    )


def offline_refusal(
    installed: str,
    wanted: str,
    erlang: str,
    enabled: Optional[set[str]],
    paths: Mapping[str, Sequence[str]],
    required: Mapping[str, Sequence[str]],
    table: Sequence[Row],
) -> str:
    """Return why RabbitMQ can't be installed or upgraded, according to the data on the disk. Return an empty string if it can.

    `installed` is empty if the package is not installed.
    """
    refusal = data_refusal(required, installed or wanted, enabled)
    if refusal or not installed:
        return refusal
    if not is_upgrade(installed, wanted):
        return erlang_refusal(table, installed, erlang)
    return (
        path_refusal(paths, installed, wanted)
        or erlang_refusal(table, installed, erlang)
        or flags_refusal(required, installed, wanted, enabled)
    )


def is_upgrade(installed: str, wanted: str) -> bool:
    """Return whether the role would replace the installed version. If the wanted version is a series, each release of the series is
    accepted."""
    return bool(installed) and not begins(installed, wanted)


def broker_refusals(
    nodes: Iterable[Object], alarms: Iterable[Object], queues: Iterable[Object], flags: Iterable[Object]
) -> list[str]:
    """Return why a running broker must not be upgraded now, from the answers of its management API."""
    found = [f"The node {node['name']} is not running." for node in nodes if not node["running"]]
    found += [f"The node {alarm['node']} has a {alarm['resource']} alarm." for alarm in alarms]
    for queue in queues:
        members, online = queue.get("members", []), queue.get("online", [])
        if members and len(online) * 2 <= len(members):
            found.append(
                f"The queue {queue['name']} in {queue['vhost']} has no majority: {len(online)} of {len(members)} members run."
            )
    disabled = disabled_flags(flags)
    if disabled:
        found.append(f"The feature flags {', '.join(disabled)} are not enabled. Run `rabbitmqctl enable_feature_flag all`.")
    return found


def disabled_flags(flags: Iterable[Object]) -> list[str]:
    """Return the names of the disabled stable feature flags. The state of a flag that a node does not know is `unavailable`."""
    return sorted(flag["name"] for flag in flags if flag["state"] == "disabled" and flag["stability"] in ("stable", "required"))


# Prints the newest machine version of quorum queues that the node supports.
MACHINE_VERSION = ["rabbitmqctl", "--quiet", "eval", "rabbit_fifo:version()."]


def current_machine_version() -> int:
    """Return the machine version that this node's quorum queues can have. Raises Failure."""
    return int(run_command(*MACHINE_VERSION))


def old_queues(statuses: Mapping[str, Iterable[Object]], current: int) -> list[str]:
    """Return the quorum queues with a member whose effective machine version is older than the node's.

    `statuses` has the members of each queue, as the management API reports them. A member that does not answer counts as old.
    """
    versions = {queue: [member.get("Machine Version") for member in members] for queue, members in statuses.items()}
    return sorted(
        queue for queue, found in versions.items() if not all(isinstance(each, int) and each >= current for each in found)
    )


def quorum_statuses(api: ManagementApi) -> dict[str, list[Object]]:
    """Return the members of each quorum queue, by the queue's name and virtual host."""
    queues = api.get("queues?columns=vhost,name,type")
    return {
        f"{queue['name']} in {queue['vhost']}": api.get(api_path("queues", "quorum", queue["vhost"], queue["name"], "status"))
        for queue in queues
        if queue["type"] == "quorum"
    }


def running_refusals(api: ManagementApi) -> list[str]:
    """Return why the running broker must not be upgraded now. Raises Failure if it does not answer."""
    found = broker_refusals(
        api.get("nodes?columns=name,running"),
        # The alarms in the list of nodes are some seconds old.
        api.health("alarms").get("alarms", []),
        api.get("queues?columns=vhost,name,members,online"),
        api.get("feature-flags"),
    )
    if found:
        return found
    old = old_queues(quorum_statuses(api), current_machine_version())
    return [f"The queues {', '.join(old)} have an old machine version. Restart the node of each queue's leader."] if old else []
