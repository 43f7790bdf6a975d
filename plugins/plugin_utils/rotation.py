"""Decides which secrets a rotation replaces, and describes the effect of each one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

# The suffix of the name under which the file of secrets keeps the old value of a rotated secret.
OLD = "_old"


class Refused(Exception):
    """The requested rotation is not possible. The text explains why."""


@dataclass(frozen=True)
class Secret:
    kind: str
    # The effect when the old value becomes invalid.
    stops: str
    # What works with the old value until the rotation is finished, if the application accepts both values.
    stays: str = "the application accepts the old value"
    # The inventory group whose hosts use the secret. Empty: an environment always uses it.
    group: str = ""


SECRETS = {
    "secret_rabbitmq_administrator_password": Secret("broker", "the administrator logs in with the new password", group="broker"),
    "secret_rabbitmq_erlang_cookie": Secret("erlang_cookie", "the brokers restart, one after another", group="broker"),
    "secret_rabbitmq_app_password": Secret(
        "broker",
        "RabbitMQ refuses new connections with the old password; open connections stay open until the services restart",
        group="broker",
    ),
    "secret_rabbitmq_worker_password": Secret("broker", "the workers restart with the new password", group="broker"),
    "secret_rabbitmq_beat_password": Secret("broker", "beat restarts with the new password", group="broker"),
    "secret_rabbitmq_flower_password": Secret("broker", "Flower restarts with the new password", group="broker"),
    "secret_rabbitmq_monitoring_password": Secret("broker", "playbooks/ops/status.yml uses the new password", group="broker"),
    "secret_postgresql_app_password": Secret(
        "database",
        "PostgreSQL refuses new connections with the old password; in an emergency, requests that need one fail until the "
        "application restarts",
        stays="the database accepts the old password",
        group="database",
    ),
    "secret_postgresql_replication_password": Secret(
        "replication", "the standby of the database connects with the new password", group="database"
    ),
    "secret_valkey_password": Secret(
        "cache", "the cache refuses new connections with the old password until the services restart", group="cache"
    ),
    "secret_django_key": Secret(
        "django",
        "sessions and links that the old key signed become invalid: everybody must log in again",
        stays="sessions that the old key signed stay valid",
    ),
    "secret_app_admin_password": Secret("admin", "the first administrator must log in again"),
    "secret_app_api_key": Secret(
        "api_keys", "requests with the old API key get 401", stays="requests with the old API key are accepted"
    ),
    "secret_app_metrics_token": Secret("metrics", "a Prometheus outside of this inventory gets 401 until it has the new token"),
    "secret_flower_password": Secret("flower", "users of Flower log in with the new password", group="flower"),
    "secret_flower_cookie": Secret("flower", "users of Flower log in again", group="flower"),
    "secret_monitoring_password": Secret("monitoring", "users of Prometheus log in with the new password", group="monitoring"),
    "secret_postgresql_monitoring_password": Secret(
        "monitoring", "the exporter restarts with the new password", group="monitoring"
    ),
}
# Another project can have other secrets.
OTHER = Secret("", "the old value becomes invalid when the hosts have the new one")
# Secrets with a different procedure.
ELSEWHERE = {
    "secret_certificate_authority": (
        "secret_certificate_authority is not rotated: every client must trust the new authority before a server uses it. "
        "rotate=certificates replaces the keys and the certificates that it signed."
    ),
    "secret_backups_password": (
        "secret_backups_password is not rotated, because it opens the existing backups. Change it with restic's command "
        "`key passwd` on each host that makes backups, and then in {path}."
    ),
    "secret_postgresql_archive_password": (
        "secret_postgresql_archive_password is not rotated, because it opens the existing backups and WAL, and pgBackRest "
        "can't change it. To change it in {path}, also set a new postgresql_archive_repository."
    ),
    "vault_password": (
        "The vault's password is on no host, so ansible-vault changes it: "
        "ansible-vault rekey --new-vault-password-file NEW_FILE {path}"
    ),
}


@dataclass(frozen=True)
class Request:
    names: tuple[str, ...]
    certificates: bool = False
    finish: bool = False


def kinds() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, secret in SECRETS.items():
        found.setdefault(secret.kind, []).append(name)
    return found


def request(words: Iterable[str], known: Collection[str], groups: Collection[str], emergency: bool, path: str) -> Request:
    """Return the secrets that the words in the variable `rotate` select. `groups` are the inventory's groups that have hosts."""
    rotatable = [name for name in known if name not in ELSEWHERE]
    used = [name for name in rotatable if SECRETS.get(name, OTHER).group in ("", *groups)]
    words = list(words)
    if "finish" in words:
        if len(words) > 1 or emergency:
            raise Refused("rotate=finish can't be combined with other values, or with rotate_emergency.")
        return Request((), finish=True)
    names: list[str] = []
    for word in words:
        if word in ELSEWHERE:
            raise Refused(ELSEWHERE[word].format(path=path))
        meant = used if word == "all" else [] if word == "certificates" else kinds().get(word, [word])
        if unknown := [name for name in meant if name not in rotatable]:
            raise Refused(
                f"rotate has {unknown[0]}; allowed: all, finish, certificates, the kinds {', '.join(kinds())}, and the secrets "
                f"{', '.join(rotatable)}."
            )
        if unused := [name for name in meant if name not in used]:
            raise Refused(
                f"rotate has {word}, but the inventory has no host in the group {SECRETS[unused[0]].group}. Change {unused[0]} "
                "where that server is managed, and then in this inventory."
            )
        names += meant
    return Request(tuple(dict.fromkeys(names)), certificates=bool({"all", "certificates"} & set(words)))


def before(names: Iterable[str], overlapping: Collection[str]) -> list[str]:
    """Return the effects of the rotation, for the person who runs it. The old values of the overlapping secrets stay valid."""
    return [f"{name}: {SECRETS.get(name, OTHER).stops}" for name in names if name not in overlapping]


def after(names: Iterable[str], overlapping: Collection[str]) -> list[str]:
    """Return what still works with the old values."""
    return [f"{name}: {SECRETS.get(name, OTHER).stays}" for name in names if name in overlapping]
