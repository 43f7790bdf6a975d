#!/usr/bin/python
"""What is in a broker: virtual hosts, users, policies and the rest, compared and applied at once by the management API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import time
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

DOCUMENTATION = r"""
module: rabbitmq_objects
short_description: Makes what is in a RabbitMQ broker so
description:
  - Reads what there is by one request, and sends what differs by one request, so it costs the same for one object and
    for hundreds. What was sent is read back.
  - Passwords are compared by the salted hash that the broker keeps, so a changed one is seen and an unchanged one is no
    change.
  - What is not listed is left alone unless I(purge) says otherwise. The user C(guest) is removed in any case.
  - A queue or an exchange that is there in another form can't be changed, which is an error before anything is sent.
  - An administrator whose password the broker does not take is set by C(rabbitmqctl) from I(definitions); it gets in by the
    Erlang cookie.
  - Stable feature flags are enabled, which an upgrade to the next series asks for.
options:
  url: {description: The management API's scheme, host and port., type: str, required: true}
  administrator: {description: The user to work as., type: str, required: true}
  password: {description: The administrator's password., type: str, required: true}
  definitions: {description: "The file on the host that defines the administrator.", type: path, required: true}
  vhosts: {description: As the role's rabbitmq_vhosts., type: list, elements: dict, default: []}
  users: {description: As the role's rabbitmq_users., type: list, elements: dict, default: []}
  policies: {description: As the role's rabbitmq_policies., type: list, elements: dict, default: []}
  operator_policies: {description: As the role's rabbitmq_operator_policies., type: list, elements: dict, default: []}
  parameters: {description: As the role's rabbitmq_parameters., type: list, elements: dict, default: []}
  global_parameters: {description: As the role's rabbitmq_global_parameters., type: list, elements: dict, default: []}
  exchanges: {description: As the role's rabbitmq_exchanges., type: list, elements: dict, default: []}
  queues: {description: As the role's rabbitmq_queues., type: list, elements: dict, default: []}
  bindings: {description: As the role's rabbitmq_bindings., type: list, elements: dict, default: []}
  purge: {description: Whether what is not listed is removed as the role's rabbitmq_purge says., type: bool, default: false}
  purge_vhosts: {description: As the role's rabbitmq_purge_vhosts., type: list, elements: str, default: []}
  timeout: {description: Seconds to wait for the API to answer after a start., type: int, default: 60}
author: The maintainers of this bundle
"""

RETURN = r"""
removed: {description: What was removed., type: list, returned: always}
kept: {description: "Virtual hosts that are not listed and stay, each with the reason.", type: list, returned: always}
"""

ALGORITHMS = {
    "rabbit_password_hashing_sha256": hashlib.sha256,
    "rabbit_password_hashing_sha512": hashlib.sha512,
}

# A password in a URI, as shovels and federation upstreams have them.
PASSWORD_IN_URI = re.compile(r"(?<=://)([^/@\s:]*):([^/@\s]+)(?=@)")

# Exchanges that each virtual host has by itself.
BUILT_IN = re.compile(r"$|amq\.")


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


def secrets_in(value):
    """The passwords in the URIs of a value."""
    if isinstance(value, dict):
        return {secret for item in value.values() for secret in secrets_in(item)}
    if isinstance(value, list):
        return {secret for item in value for secret in secrets_in(item)}
    return {found[1] for found in PASSWORD_IN_URI.findall(value)} if isinstance(value, str) else set()


def masked(value):
    """A value without the passwords in its URIs."""
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return PASSWORD_IN_URI.sub(r"\1:********", value) if isinstance(value, str) else value


def path(*parts):
    """A path below /api; names may hold slashes and spaces."""
    return "/".join(quote(part, safe="") for part in parts)


class Differences:
    """What the broker has not as wanted: `send` are definitions, `delete` are paths of the API, the rest is for people.

    `before` and `after` map names of objects to readable values without secrets, `clashes` are sentences.
    """

    def __init__(self, actual, wanted):
        self.actual, self.wanted = actual, wanted
        self.send, self.delete = {}, []
        self.before, self.after, self.clashes = {}, {}, []
        for compare in (
            self.vhosts,
            self.users,
            self.policies,
            self.operator_policies,
            self.parameters,
            self.global_parameters,
            self.exchanges,
            self.queues,
            self.bindings,
        ):
            compare()

    def __bool__(self):
        return bool(self.after)

    def note(self, name, old, new):
        self.before[name], self.after[name] = masked(old), masked(new)

    def found(self, kind, *keys):
        """The broker's objects of a kind by their keys."""
        return {tuple(entry[key] for key in keys): entry for entry in self.actual.get(kind) or []}

    def listed(self, kind):
        return self.wanted.get(kind) or []

    def differ(self, kind, name, old, entry, values):
        """Note and send an object of `kind` whose values in the broker, None where there is none, are not those wanted."""
        if old != values:
            self.send.setdefault(kind, []).append({**entry, **values})
            self.note(name, old, values)

    def remove(self, name, old, *parts):
        self.delete.append(path(*parts))
        self.note(name, old, None)

    def vhosts(self):
        vhosts, parameters = self.found("vhosts", "name"), self.found("parameters", "component", "vhost", "name")
        for vhost in self.listed("vhosts"):
            name, old = vhost["name"], vhosts.get((vhost["name"],))
            metadata = (old or {}).get("metadata") or {}
            values = {
                "description": vhost.get("description") or "",
                "default_queue_type": vhost.get("default_queue_type") or "quorum",
            }
            # Older brokers have what a virtual host is beside its metadata, newer ones within.
            old_values = old and {key: old.get(key) or metadata.get(key) or "" for key in values}
            entry = {**(old or {}), "name": name, "metadata": {**metadata, **values}}
            self.differ("vhosts", f"vhost {name}", old_values, entry, values)
            limits = {"value": vhost.get("limits") or {}}
            key = {"component": "vhost-limits", "vhost": name, "name": "limits"}
            # The broker writes limits that were taken back as an empty list.
            old_limits = {"value": parameters.get(tuple(key.values()), {}).get("value") or {}}
            self.differ("parameters", f"limits of vhost {name}", old_limits, key, limits)

    def users(self):
        users, permissions = self.found("users", "name"), self.found("permissions", "user", "vhost")
        topics = self.found("topic_permissions", "user", "vhost", "exchange")
        for user in self.listed("users"):
            name, tags, limits = user["name"], sorted(user.get("tags") or []), user.get("limits") or {}
            old = users.get((name,))
            kept = old is not None and password_matches(user["password"], old)
            old_values = old and {
                "tags": tags_of(old),
                "limits": old.get("limits") or {},
                "password": "as wanted" if kept else "another",
            }
            values = {"tags": tags, "limits": limits, "password": "as wanted"}
            if old_values != values:
                hashed = {key: old[key] for key in ("password_hash", "hashing_algorithm")} if kept else {
                    "password_hash": password_hash(user["password"]),
                    "hashing_algorithm": "rabbit_password_hashing_sha256",
                }  # fmt: skip
                self.send.setdefault("users", []).append({"name": name, "tags": tags, "limits": limits, **hashed})
                self.note(f"user {name}", old_values, values)
                # An import sets limits and takes none back.
                self.delete += [path("user-limits", name, key) for key in (old_values or values)["limits"] if key not in limits]
            for entry in user.get("permissions") or []:
                values = {key: entry.get(key) or "" for key in ("configure", "write", "read")}
                key = {"user": name, "vhost": entry["vhost"]}
                old = permissions.get(tuple(key.values()))
                old_values = old and {field: old[field] for field in values}
                self.differ("permissions", f"permissions of {name} in {entry['vhost']}", old_values, key, values)
            for entry in user.get("topic_permissions") or []:
                values = {field: entry.get(field) or "" for field in ("write", "read")}
                key = {"user": name, "vhost": entry["vhost"], "exchange": entry["exchange"]}
                old = topics.get(tuple(key.values()))
                old_values = old and {field: old[field] for field in values}
                where = f"{entry['exchange']} in {entry['vhost']}"
                self.differ("topic_permissions", f"topic permissions of {name} on {where}", old_values, key, values)
        if ("guest",) in users:
            self.remove("user guest", {"tags": tags_of(users[("guest",)])}, "users", "guest")

    def policies(self):
        policies = self.found("policies", "vhost", "name")
        for policy in self.listed("policies"):
            values, key = policy_values(policy), {"vhost": policy["vhost"], "name": policy["name"]}
            old = policies.get(tuple(key.values()))
            old_values = old and {field: old.get(field) for field in values}
            self.differ("policies", f"policy {policy['name']} in {policy['vhost']}", old_values, key, values)

    def operator_policies(self):
        parameters = self.found("parameters", "component", "vhost", "name")
        for policy in self.listed("operator_policies"):
            values = {"value": policy_values(policy)}
            key = {"component": "operator_policy", "vhost": policy["vhost"], "name": policy["name"]}
            old = parameters.get(tuple(key.values()))
            old_values = old and {"value": {field: old["value"].get(field) for field in values["value"]}}
            self.differ("parameters", f"operator policy {policy['name']} in {policy['vhost']}", old_values, key, values)

    def parameters(self):
        parameters = self.found("parameters", "component", "vhost", "name")
        for parameter in self.listed("parameters"):
            key = {field: parameter[field] for field in ("component", "vhost", "name")}
            old = parameters.get(tuple(key.values()))
            name = f"{parameter['component']} {parameter['name']} in {parameter['vhost']}"
            self.differ("parameters", name, old and {"value": old["value"]}, key, {"value": parameter["value"]})

    def global_parameters(self):
        parameters = self.found("global_parameters", "name")
        for parameter in self.listed("global_parameters"):
            name = parameter["name"]
            old = parameters.get((name,))
            values = {"value": parameter["value"]}
            self.differ("global_parameters", f"global parameter {name}", old and {"value": old["value"]}, {"name": name}, values)

    def declared(self, kind, name, old, entry, values):
        """As `differ`, for what can't be changed once it is there; the import would leave it without a word."""
        if old is not None and old != values:
            been, be = ({key: item for key, item in side.items() if old[key] != values[key]} for side in (old, values))
            self.clashes.append(f"{name} is there with {json.dumps(been)}, which can't be made {json.dumps(be)}")
        else:
            self.differ(kind, name, old, entry, values)

    def exchanges(self):
        exchanges = self.found("exchanges", "vhost", "name")
        for exchange in self.listed("exchanges"):
            key = {"vhost": exchange["vhost"], "name": exchange["name"]}
            values = {
                "type": exchange.get("type") or "topic",
                "durable": True,
                "auto_delete": False,
                "internal": bool(exchange.get("internal")),
                "arguments": exchange.get("arguments") or {},
            }
            old = exchanges.get(tuple(key.values()))
            old_values = old and {field: old.get(field) for field in values}
            self.declared("exchanges", f"exchange {key['name']} in {key['vhost']}", old_values, key, values)

    def queues(self):
        queues = self.found("queues", "vhost", "name")
        for queue in self.listed("queues"):
            key = {"vhost": queue["vhost"], "name": queue["name"]}
            arguments = {**(queue.get("arguments") or {}), "x-queue-type": queue.get("type") or "quorum"}
            values = {"durable": True, "auto_delete": False, "arguments": arguments}
            old = queues.get(tuple(key.values()))
            old_values = old and {field: old.get(field) for field in values}
            if old:
                old_values["arguments"] = {"x-queue-type": "classic", **(old.get("arguments") or {})}
            self.declared("queues", f"queue {key['name']} in {key['vhost']}", old_values, key, values)

    def bindings(self):
        found = {binding_key(binding) for binding in self.actual.get("bindings") or []}
        for binding in self.listed("bindings"):
            key = binding_key(binding)
            if key not in found:
                vhost, source, kind, destination, routing_key, arguments = key
                self.send.setdefault("bindings", []).append(
                    {
                        "vhost": vhost,
                        "source": source,
                        "destination_type": kind,
                        "destination": destination,
                        "routing_key": routing_key,
                        "arguments": json.loads(arguments),
                    }
                )
                name = f"binding of {kind} {destination} to {source} in {vhost}"
                self.note(f"{name} by {routing_key!r} {arguments}", None, {"routing_key": routing_key})

    def purge(self, administrator, removable):
        """Remove users, permissions and policies that are not listed, and the virtual hosts of `removable`."""
        vhosts = {vhost["name"] for vhost in self.actual.get("vhosts") or []} & set(removable)
        for name in sorted(vhosts):
            self.remove(f"vhost {name}", "with all that is in it", "vhosts", name)
        users = {user["name"]: user for user in self.listed("users")}
        gone = {name for (name,) in self.found("users", "name")} - users.keys() - {administrator, "guest"}
        for name in sorted(gone):
            self.remove(f"user {name}", "not listed", "users", name)
        grants = {(name, entry["vhost"]) for name, user in users.items() for entry in user.get("permissions") or []}
        for (user, vhost), old in sorted(self.found("permissions", "user", "vhost").items()):
            # Those of a user or a virtual host that goes go with it.
            if user in users and vhost not in vhosts and (user, vhost) not in grants:
                values = {key: old[key] for key in ("configure", "write", "read")}
                self.remove(f"permissions of {user} in {vhost}", values, "permissions", vhost, user)
        grants = {
            (name, entry["vhost"], entry["exchange"])
            for name, user in users.items()
            for entry in user.get("topic_permissions") or []
        }
        for (user, vhost, exchange), old in sorted(self.found("topic_permissions", "user", "vhost", "exchange").items()):
            if user in users and vhost not in vhosts and (user, vhost, exchange) not in grants:
                values = {key: old[key] for key in ("write", "read")}
                name = f"topic permissions of {user} on {exchange} in {vhost}"
                self.remove(name, values, "topic-permissions", vhost, user, exchange)
        policies = {(policy["vhost"], policy["name"]) for policy in self.listed("policies")}
        for (vhost, name), old in sorted(self.found("policies", "vhost", "name").items()):
            if vhost not in vhosts and (vhost, name) not in policies:
                self.remove(f"policy {name} in {vhost}", policy_values(old), "policies", vhost, name)
        policies = {("operator_policy", policy["vhost"], policy["name"]) for policy in self.listed("operator_policies")}
        for key, old in sorted(self.found("parameters", "component", "vhost", "name").items()):
            component, vhost, name = key
            if component == "operator_policy" and vhost not in vhosts and key not in policies:
                self.remove(f"operator policy {name} in {vhost}", policy_values(old["value"]), "operator-policies", vhost, name)


def policy_values(policy):
    return {
        "pattern": policy["pattern"],
        "apply-to": policy.get("apply_to") or policy.get("apply-to") or "all",
        "priority": policy.get("priority") or 0,
        "definition": policy["definition"],
    }


def binding_key(binding):
    return (
        binding["vhost"],
        binding["source"],
        binding.get("destination_type") or "queue",
        binding["destination"],
        binding.get("routing_key") or "",
        json.dumps(binding.get("arguments") or {}, sort_keys=True),
    )


def occupants(queues, exchanges, connections):
    """What a virtual host holds that would be lost with it, as readable parts; none where it is empty."""
    messages = sum(queue.get("messages") or 0 for queue in queues)
    own = [exchange for exchange in exchanges if not BUILT_IN.match(exchange["name"])]
    parts = [(len(queues), "queues"), (messages, "messages"), (len(own), "exchanges"), (len(connections), "connections")]
    return [f"{count} {what}" for count, what in parts if count]


class Broker:
    """The management API of one node."""

    def __init__(self, url, administrator, password, definitions, timeout):
        self.url = url
        self.administrator = administrator
        self.password = password
        self.definitions = definitions
        self.until = time.monotonic() + timeout

    def request(self, method, below, data=None):
        while True:
            try:
                with open_url(
                    f"{self.url}/api/{below}",
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
                # What is to go may be gone, by hand or by a run that was interrupted.
                if error.code == 404 and method == "DELETE":
                    return None
                reason = error.read().decode(errors="replace").strip()
                raise Failure(f"The management API at {self.url} answered {error.code}: {reason}") from None
            except (URLError, OSError) as error:
                if time.monotonic() > self.until:
                    raise NoAnswer(f"The management API at {self.url} does not answer: {error}") from None
                time.sleep(0.5)

    def read(self):
        return self.request("GET", "definitions")

    def feature_flags(self):
        """Names of the stable feature flags that are not enabled. One that a node does not know is `unavailable`."""
        flags = self.request("GET", "feature-flags")
        return sorted(flag["name"] for flag in flags if flag["state"] == "disabled" and flag["stability"] in ("stable", "required"))

    def occupants(self, vhost):
        listing = "disable_stats=true&enable_queue_totals=true"
        return occupants(
            self.request("GET", f"{path('queues', vhost)}?{listing}"),
            self.request("GET", path("exchanges", vhost)),
            self.request("GET", path("vhosts", vhost, "connections")),
        )

    def removable(self, actual, wanted):
        """Virtual hosts that may go, which are empty or named, and a sentence for each other that is not listed."""
        listed, named = {vhost["name"] for vhost in wanted["vhosts"]}, set(wanted["purge_vhosts"])
        strangers = {vhost["name"] for vhost in actual["vhosts"]} - listed
        held = {vhost: self.occupants(vhost) for vhost in sorted(strangers - named)}
        kept = [f"vhost {vhost} is not listed and stays: it has {', '.join(parts)}." for vhost, parts in held.items() if parts]
        return {vhost for vhost in strangers if not held.get(vhost)}, kept

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

    def apply(self, differences):
        """Send, then delete: what takes an old object's place is there before it goes."""
        if differences.send:
            self.request("POST", "definitions", differences.send)
        for below in differences.delete:
            self.request("DELETE", below)

    def verify(self, compare):
        """The import passes over what it can't make, and other nodes may be a moment behind."""
        until = time.monotonic() + 5
        while True:
            left = compare(self.read())
            if not left:
                return
            if time.monotonic() > until:
                names = ", ".join(left.after)
                raise Failure(
                    f"The broker took what was sent and does not have it so: {names}. "
                    "A queue or an exchange of that name may be there that is transient or exclusive."
                )
            time.sleep(0.5)


def run(module):
    wanted = module.params
    # Check mode starts no broker: one that does not answer now is not waited for.
    timeout = 0 if module.check_mode else wanted["timeout"]
    broker = Broker(*(wanted[name] for name in ("url", "administrator", "password", "definitions")), timeout)
    before, after, kept = {}, {}, []
    try:
        actual = broker.read()
    except HTTPError:
        name = f"user {broker.administrator}"
        before[name], after[name] = {"password": "another"}, {"password": "as wanted"}
        if module.check_mode:
            return {"changed": True, "removed": [], "kept": [], "diff": {"before": before, "after": after}}
        broker.set_administrator()
        try:
            actual = broker.read()
        except HTTPError:
            raise Failure(f"The broker refuses {broker.administrator} even after its password was set.") from None
    module.no_log_values.update(secrets_in([actual.get("parameters"), actual.get("global_parameters")]))
    flags = broker.feature_flags()
    removable = set()
    if wanted["purge"]:
        removable, kept = broker.removable(actual, wanted)

    def compare(definitions):
        found = Differences(definitions, wanted)
        if wanted["purge"]:
            found.purge(broker.administrator, removable)
        return found

    found = compare(actual)
    if found.clashes:
        raise Failure("; ".join(found.clashes) + ". Remove it once it is empty, or list it as it is, or by another name.")
    before.update(found.before)
    after.update(found.after)
    for flag in flags:
        before[f"feature flag {flag}"], after[f"feature flag {flag}"] = "disabled", "enabled"
    if not module.check_mode:
        for flag in flags:
            broker.request("PUT", path("feature-flags", flag, "enable"), {})
        if found:
            broker.apply(found)
            broker.verify(compare)
    removed = [name for name, value in after.items() if value is None]
    return {"changed": bool(after), "removed": removed, "kept": kept, "diff": {"before": before, "after": after}}


def main():
    objects = {"type": "list", "elements": "dict", "default": []}
    user = {
        "name": {"type": "str", "required": True},
        "password": {"type": "str", "required": True, "no_log": True},
        "tags": {"type": "list", "elements": "str", "default": []},
        "limits": {"type": "dict", "default": {}},
        "permissions": objects,
        "topic_permissions": objects,
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
            "operator_policies": objects,
            "parameters": objects,
            "global_parameters": objects,
            "exchanges": objects,
            "queues": objects,
            "bindings": objects,
            "purge": {"type": "bool", "default": False},
            "purge_vhosts": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    # What Ansible prints of the arguments at -vvv is without them too.
    module.no_log_values.update(secrets_in([module.params["parameters"], module.params["global_parameters"]]))
    try:
        result = run(module)
    except Failure as failure:
        if module.check_mode and isinstance(failure, NoAnswer):
            module.exit_json(changed=True, msg=f"{failure}. What is in the broker was not compared.")
        module.fail_json(msg=masked(str(failure)))
    for sentence in result["kept"]:
        module.warn(f"{sentence} rabbitmq_purge_vhosts with its name would remove it.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
