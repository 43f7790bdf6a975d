#!/usr/bin/python
"""Virtual hosts, users, permissions and policies of a broker, compared and applied at once by the management API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import time
from urllib.error import HTTPError, URLError

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

DOCUMENTATION = r"""
module: rabbitmq_objects
short_description: Makes virtual hosts, users, permissions and policies of a RabbitMQ broker so
description:
  - Reads what there is by one request, and sends what differs by one request, so it costs the same for one object and
    for hundreds.
  - Passwords are compared by the salted hash that the broker keeps, so a changed one is seen and an unchanged one is no
    change.
  - What is not listed is left alone.
  - An administrator whose password the broker does not take is set by C(rabbitmqctl) from I(definitions); it gets in by the
    Erlang cookie.
options:
  url: {description: The management API's scheme, host and port., type: str, required: true}
  administrator: {description: The user to work as., type: str, required: true}
  password: {description: The administrator's password., type: str, required: true}
  definitions: {description: "The file on the host that defines the administrator.", type: path, required: true}
  vhosts: {description: As the role's rabbitmq_vhosts., type: list, elements: dict, default: []}
  users: {description: As the role's rabbitmq_users., type: list, elements: dict, default: []}
  policies: {description: As the role's rabbitmq_policies., type: list, elements: dict, default: []}
  timeout: {description: Seconds to wait for the API to answer after a start., type: int, default: 60}
author: The maintainers of this bundle
"""

ALGORITHMS = {
    "rabbit_password_hashing_sha256": hashlib.sha256,
    "rabbit_password_hashing_sha512": hashlib.sha512,
}


class Failure(Exception):
    """The broker can't be made so; carries the message for the person who runs the playbook."""


class NoAnswer(Failure):
    """The API did not answer in time."""


def password_hash(password):
    """A new salted SHA-256, as RabbitMQ's page "Passwords" describes it."""
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def password_matches(password, user):
    """Whether a user's hash in the broker is one of this password."""
    algorithm = ALGORITHMS.get(user.get("hashing_algorithm"))
    kept = base64.b64decode(user.get("password_hash") or "")
    return algorithm is not None and kept[4:] == algorithm(kept[:4] + password.encode()).digest()


def tags_of(user):
    """A user's tags as a sorted list; older brokers write them as one string with commas."""
    tags = user.get("tags") or []
    return sorted(tags.split(",")) if isinstance(tags, str) else sorted(tags)


def queue_type_of(vhost):
    return vhost.get("default_queue_type") or (vhost.get("metadata") or {}).get("default_queue_type")


def differences(actual, wanted):
    """What of `wanted` the broker does not have so.

    Returns definitions to send and two mappings of object names to readable values, before and after, without secrets.
    """
    send = {"vhosts": [], "users": [], "permissions": [], "policies": []}
    before, after = {}, {}

    def note(name, old, new):
        before[name], after[name] = old, new

    vhosts = {vhost["name"]: vhost for vhost in actual.get("vhosts", [])}
    for vhost in wanted["vhosts"]:
        name, description = vhost["name"], vhost.get("description") or ""
        queue_type = vhost.get("default_queue_type") or "quorum"
        old = vhosts.get(name)
        old_values = old and {
            "description": old.get("description") or (old.get("metadata") or {}).get("description") or "",
            "default_queue_type": queue_type_of(old),
        }
        values = {"description": description, "default_queue_type": queue_type}
        if old_values != values:
            metadata = {**((old or {}).get("metadata") or {}), **values}
            send["vhosts"].append({**(old or {}), "name": name, **values, "metadata": metadata})
            note(f"vhost {name}", old_values, values)

    users = {user["name"]: user for user in actual.get("users", [])}
    permissions = {(entry["user"], entry["vhost"]): entry for entry in actual.get("permissions", [])}
    for user in wanted["users"]:
        name, tags = user["name"], sorted(user.get("tags") or [])
        old = users.get(name)
        same_password = old is not None and password_matches(user["password"], old)
        if old is None or tags_of(old) != tags or not same_password:
            send["users"].append(
                {
                    "name": name,
                    "tags": tags,
                    "limits": (old or {}).get("limits") or {},
                    "password_hash": old["password_hash"] if same_password else password_hash(user["password"]),
                    "hashing_algorithm": old["hashing_algorithm"] if same_password else "rabbit_password_hashing_sha256",
                }
            )
            note(
                f"user {name}",
                old and {"tags": tags_of(old), "password": "as wanted" if same_password else "another"},
                {"tags": tags, "password": "as wanted"},
            )
        for entry in user.get("permissions") or []:
            values = {key: entry.get(key) or "" for key in ("configure", "write", "read")}
            old = permissions.get((name, entry["vhost"]))
            old_values = old and {key: old[key] for key in values}
            if old_values != values:
                send["permissions"].append({"user": name, "vhost": entry["vhost"], **values})
                note(f"permissions of {name} in {entry['vhost']}", old_values, values)

    policies = {(policy["vhost"], policy["name"]): policy for policy in actual.get("policies", [])}
    for policy in wanted["policies"]:
        values = {
            "pattern": policy["pattern"],
            "apply-to": policy.get("apply_to") or "all",
            "priority": policy.get("priority") or 0,
            "definition": policy["definition"],
        }
        old = policies.get((policy["vhost"], policy["name"]))
        old_values = old and {key: old.get(key) for key in values}
        if old_values != values:
            send["policies"].append({"vhost": policy["vhost"], "name": policy["name"], **values})
            note(f"policy {policy['name']} in {policy['vhost']}", old_values, values)

    return {kind: objects for kind, objects in send.items() if objects}, before, after


class Broker:
    """The management API of one node."""

    def __init__(self, url, administrator, password, definitions, timeout):
        self.url = url
        self.administrator = administrator
        self.password = password
        self.definitions = definitions
        self.until = time.monotonic() + timeout

    def request(self, method, data=None):
        while True:
            try:
                with open_url(
                    f"{self.url}/api/definitions",
                    method=method,
                    data=None if data is None else json.dumps(data),
                    headers={"Content-Type": "application/json"},
                    url_username=self.administrator,
                    url_password=self.password,
                    force_basic_auth=True,
                    use_proxy=False,
                    timeout=60,
                ) as response:
                    text = response.read()
                    return json.loads(text) if text.strip() else None
            except HTTPError as error:
                if error.code == 401:
                    raise
                reason = error.read().decode(errors="replace").strip()
                raise Failure(f"The management API at {self.url} answered {error.code}: {reason}") from None
            except (URLError, OSError) as error:
                if time.monotonic() > self.until:
                    raise NoAnswer(f"The management API at {self.url} does not answer: {error}") from None
                time.sleep(0.5)

    def set_administrator(self):
        """Set the administrator from the file of bootstrap definitions; rabbitmqctl gets in by the Erlang cookie."""
        done = subprocess.run(
            ["rabbitmqctl", "--quiet", "import_definitions", self.definitions],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise Failure(f"The administrator can't be set by rabbitmqctl: {done.stderr.strip() or done.stdout.strip()}")


def run(module):
    parameters = module.params
    # Check mode starts no broker: one that does not answer now is not waited for.
    timeout = 0 if module.check_mode else parameters["timeout"]
    broker = Broker(*(parameters[name] for name in ("url", "administrator", "password", "definitions")), timeout)
    before, after = {}, {}
    try:
        actual = broker.request("GET")
    except HTTPError:
        name = f"user {broker.administrator}"
        before[name], after[name] = {"password": "another"}, {"password": "as wanted"}
        if module.check_mode:
            return True, before, after
        broker.set_administrator()
        try:
            actual = broker.request("GET")
        except HTTPError:
            raise Failure(f"The broker refuses {broker.administrator} even after its password was set.") from None
    send, old, new = differences(actual, parameters)
    before.update(old)
    after.update(new)
    if send and not module.check_mode:
        broker.request("POST", send)
    return bool(after), before, after


def main():
    objects = {"type": "list", "elements": "dict", "default": []}
    user = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "required": True, "no_log": True},
        "tags": {"type": "list", "elements": "str", "default": []},
        "permissions": objects,
    }
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "administrator": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
            "definitions": {"type": "path", "required": True},
            "vhosts": objects,
            "users": {**objects, "options": user},
            "policies": objects,
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    try:
        changed, before, after = run(module)
    except Failure as failure:
        if module.check_mode and isinstance(failure, NoAnswer):
            module.exit_json(changed=True, msg=f"{failure}. What is in the broker was not compared.")
        module.fail_json(msg=str(failure))
    module.exit_json(changed=changed, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
