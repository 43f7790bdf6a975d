"""Replaces secrets in a variables file. This is an action plugin, since only the controller has Ansible's vault passwords."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib
from ansible.plugins.action import ActionBase
from ansible_collections.django_celery.stack.plugins.action.secrets_file import (
    NotAdded,
    added,
    changed,
    entries,
    locked,
    problem,
    random_secret,
    read,
    removed,
    replace,
    top,
)
from ansible_collections.django_celery.stack.plugins.plugin_utils.rotation import OLD, Refused, after, before, request


def values(text: str) -> dict[str, str]:
    mapping = top(text)
    return {key.value: value.value for key, value in mapping.value} if mapping else {}


def rotated(text: str, names: Collection[str], emergency: bool, make: Callable[[], str] = random_secret) -> tuple[str, list[str]]:
    """Return the text with new values, and the names that got one.

    The old value stays in the text as NAME_old. Without an emergency, a secret that has an old value is not replaced again: an
    earlier run, which may have been killed, has replaced it.
    """
    known = values(text)
    new = {name: make() for name in names if emergency or name + OLD not in known}
    kept = {} if emergency else {name + OLD: known[name] for name in new}
    return added(removed(changed(text, new), [name + OLD for name in new]), kept), list(new)


def finished(text: str, names: Collection[str]) -> tuple[str, list[str]]:
    """Return the text without old values, and the names that had one."""
    olds = [name for name in names if name + OLD in values(text)]
    return removed(text, [name + OLD for name in olds]), olds


def other_files(inventory: Path, file: Path, names: Collection[str], vault: VaultLib) -> Iterator[tuple[str, Path]]:
    """Yield the names that other variables files of the inventory set, with the file."""
    for folder in ("group_vars", "host_vars"):
        for path in sorted(path for path in (inventory / folder).rglob("*") if path.is_file() and path.resolve() != file):
            try:
                text, _ = read(path, vault)
                found = [name for name, _ in entries(text) if name in names]
            except (NotAdded, UnicodeDecodeError):
                # Ansible has loaded all variables files, so this is not a variables file.
                continue
            yield from ((name, path) for name in found)


def check_sources(
    text: str, names: Collection[str], options: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]], vault: VaultLib
):
    """Refuse secrets that the file does not set, or that something else in the inventory overrides."""
    path, inventory = Path(options["path"]), Path(options["inventory"])
    for name, other in other_files(inventory, path.resolve(), names, vault):
        raise Refused(f"{name} is set in {other}, not by {path.name}: change it there, then run site.yml.")
    known = values(text)
    if missing := [name for name in names if name not in known]:
        raise Refused(f"{path} lacks {', '.join(missing)}. If the inventory sets it nowhere else, run create_secrets.yml.")
    for host, variables in hosts.items():
        # The application reads SECRET_KEY, so a value in app_environment replaces secret_django_key.
        if "secret_django_key" in names and "SECRET_KEY" in (variables.get("app_environment") or {}):
            raise Refused("SECRET_KEY of app_environment replaces secret_django_key: change it there, then run site.yml.")
        for name in names:
            if str(variables.get(name)) != known[name]:
                raise Refused(
                    f"{host} has a different {name} than {path}: something else in the inventory sets it. Change it there."
                )


class ActionModule(ActionBase):
    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        _, options = self.validate_argument_spec(
            {
                "path": {"type": "path", "required": True},
                "inventory": {"type": "path", "required": True},
                "rotate": {"type": "list", "elements": "str", "required": True},
                "emergency": {"type": "bool", "default": False},
                "names": {"type": "list", "elements": "str", "required": True},
                "overlapping": {"type": "list", "elements": "str", "default": []},
            }
        )
        try:
            return self.rotate(options, task_vars)
        except Refused as error:
            raise AnsibleActionFail(f"{error} Nothing was changed.") from None
        except (NotAdded, OSError, UnicodeDecodeError) as error:
            raise AnsibleActionFail(f"{problem(options['path'], error)} Nothing was changed.") from None

    def rotate(self, options, task_vars):
        # The path may be a link, if a team stores the file elsewhere.
        path = Path(options["path"]).resolve()
        vault = self._loader._vault
        groups = {name: hosts for name, hosts in task_vars["groups"].items() if hosts}
        wanted = request(options["rotate"], options["names"], groups, options["emergency"], options["path"])
        if not path.exists():
            raise Refused(f"{options['path']} does not exist. create_secrets.yml creates it.")
        with locked(path.parent):
            text, encode = read(path, vault)
            if wanted.finish:
                new_text, names = finished(text, options["names"])
            else:
                hosts = {host: task_vars["hostvars"][host] for host in groups["all"]}
                check_sources(text, wanted.names, options, hosts, vault)
                new_text, names = rotated(text, wanted.names, options["emergency"])
            if new_text != text and not self._task.check_mode:
                replace(path, encode(new_text))
        overlapping = [] if options["emergency"] or wanted.finish else options["overlapping"]
        earlier = [name for name in wanted.names if name not in names]
        return {
            "changed": new_text != text,
            "names": names,
            "earlier": earlier,
            "certificates": wanted.certificates,
            "stops": before(names, overlapping),
            "stays": after([*names, *earlier], overlapping),
        }
