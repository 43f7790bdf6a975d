"""Finds errors in an inventory that no single role can detect: in groups, in secrets, and in the variables from inventories/common.

The errors are sentences for the person who runs the playbook. No error shows a secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from ansible_collections.django_celery.stack.plugins.filter.role_variables import LOADER, misnamed, mistyped, role_options
from jinja2 import UndefinedError, pass_context

COLLECTION = Path(__file__).resolve().parents[2]
REQUIRED_GROUPS = ("app", "web", "workers")
OPTIONAL_GROUPS = ("broker", "database", "cache", "flower", "proxy", "monitoring")
# The roles that validate.yml checks, per inventory group whose hosts run them.
ROLES = {
    "all": ("offline_packages", "ca_certificates", "certificates", "firewall", "monitoring"),
    "broker": ("erlang", "rabbitmq", "backups"),
    "database": ("postgresql", "backups"),
    "cache": ("valkey",),
    "app": ("django",),
    "workers": ("celery",),
    "flower": ("flower",),
    "proxy": ("nginx",),
}
# Prefixes of variables in inventories/common, in addition to the prefixes of the roles' variables.
PREFIXES = ("app_", "backup_", "host_", "service_", "wiring_")
SPECIFICATIONS = ("app_variable_specs", "wiring_variable_specs")


def distance(one, other):
    """Return the edit distance of two words. An edit adds, removes or replaces a letter, or swaps two neighbouring letters."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def misspelt(name, known, mistakes):
    """Return the first known name that differs from the given name by at most the given number of typing errors."""
    return next((word for word in known if word != name and distance(name, word) <= mistakes), None)


def did_you_mean(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else None


# Groups


def group_errors(groups):
    """Return errors for missing required groups, and for hosts that are in `web` or `workers` but not in `app`."""
    own = [name for name in groups if name not in ("all", "ungrouped")]
    expected = REQUIRED_GROUPS + OPTIONAL_GROUPS
    others = [name for name in own if name not in expected]
    sentences = []
    for name in expected:
        if name in own:
            continue
        if near := misspelt(name, others, max(1, len(name) // 4)):
            sentences.append(f"The inventory has no group {name}, but a group {near}; did you mean {name}?")
        elif name in REQUIRED_GROUPS:
            sentences.append(f"The inventory has no group {name}.")
    if sentences:
        sentences.append(
            f"Its groups are {', '.join(own) or 'none'}. The group app is required, with the groups web and workers in it. "
            "The groups broker, database, cache, flower, proxy and monitoring are optional."
        )
        return sentences
    for name in ("web", "workers"):
        if outside := [host for host in groups[name] if host not in groups["app"]]:
            sentences.append(f"The group {name} has {', '.join(outside)}, which the group app lacks: make {name} a child of app.")
    return sentences


def host_count_errors(host, groups, values):
    """Return errors for groups with a wrong number of hosts. In a Molecule scenario, each host can be a separate environment."""
    sentences = []
    brokers = groups.get("broker", [])
    if host in brokers and len(brokers) > 1 and values.get("wiring_brokers") != [host] and len(brokers) % 2 == 0:
        sentences.append(
            f"The group broker has the hosts {', '.join(brokers)}; allowed: one, three, or a larger odd number. A cluster of two "
            "stops if it loses either broker, and four can lose no more brokers than three can."
        )
    caches = groups.get("cache", [])
    if host in caches and len(caches) > 1 and values.get("wiring_cache") != host:
        sentences.append(
            f"The group cache has the hosts {', '.join(caches)}; allowed: one, or several if each host is a separate "
            "environment, with wiring_cache set to the host's name."
        )
    return sentences + database_errors(host, groups.get("database", []), values)


def database_errors(host, databases, values):
    """Return errors for the hosts of the primary and of its standby."""
    if host not in databases:
        return []
    primary, standbys = values.get("wiring_database", databases[0]), values.get("wiring_standbys", [])
    if primary == host and not standbys:
        return []
    sentences = []
    if primary not in databases:
        sentences.append(f"wiring_database is '{primary}'; allowed: a host of the group database, {' or '.join(databases)}.")
    elif len(databases) > 2:
        sentences.append(
            f"The group database has the hosts {', '.join(databases)}; allowed: one host; two hosts, if one is a standby; "
            "or several hosts, if each one is a separate environment with wiring_database set to its name and wiring_standbys set "
            "to []."
        )
    if str(values.get("host_platform", "")).startswith("macos"):
        sentences.append(
            f"host_platform is '{values.get('host_platform')}', and the group database has the hosts {', '.join(databases)}; "
            "allowed: one, because a server on a Mac has no standby."
        )
    return sentences


def monitoring_errors(host, groups, values):
    """Return errors for a group monitoring that the environment can't have."""
    monitors = groups.get("monitoring", [])
    sentences = []
    if host in monitors and len(monitors) > 1:
        sentences.append(f"The group monitoring has the hosts {', '.join(monitors)}; allowed: one.")
    platform = values.get("host_platform", "")
    if monitors and platform.startswith(("el", "macos")):
        sentences.append(
            f"host_platform is '{platform}', which does not package Prometheus' exporters, and the group monitoring has "
            f"{', '.join(monitors)}; allowed with monitoring: Debian and Ubuntu."
        )
    if set(monitors) - {host} and values.get("firewall_enabled") is not True:
        sentences.append(
            f"firewall_enabled is false, and the group monitoring has {', '.join(monitors)}; allowed: true if the monitoring is "
            "on another host, because metrics without a login are then open to the network."
        )
    return sentences


# Variables


def common_names(directories):
    """Return the names of all variables in an inventory's link to inventories/common, or None without a link."""
    folders = [Path(directory, "group_vars", "all", "00-common") for directory in directories if directory]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return None
    names = set()
    for file in (path for path in sorted(folder.rglob("*")) if path.suffix in (".yml", ".yaml", ".json")):
        # The file is composed, not loaded, since a value may have one of Ansible's tags.
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER)
        names |= {key.value for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    return names


def url_error(name, url, schemes):
    """Return an error if a URL is malformed, or None. The error does not contain the URL, which may contain a password."""
    wanted = f"allowed: a URL such as {schemes[0]}://host:port, with the scheme {', '.join(schemes[:-1])} or {schemes[-1]}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"{name} has a malformed port or host; {wanted}. Special characters in a password must be URL-encoded (urlencode)."
    if parts.scheme not in schemes or not url.startswith(f"{parts.scheme}://"):
        return f"{name} has no scheme or a wrong one; {wanted}."
    if parts.scheme != "consolemail" and not re.fullmatch(r"[\w.:%,-]+", parts.hostname or ""):
        return f"{name} has no host; {wanted}."
    return f"{name} has the port 0; {wanted}." if port == 0 else None


class Values:
    """The variables of a host. Variables that can't be evaluated are grouped by the reason for the failure."""

    def __init__(self, context, names):
        self.context, self.names, self.failed = context, names, {}

    def __contains__(self, name):
        return name in self.names

    def get(self, name, default=None):
        return self.context.resolve(name) if name in self.names else default

    def errors_of(self, name, find):
        """Return the errors that `find` returns for the value. If the value can't be evaluated, record the reason."""
        try:
            return list(find(self.context.resolve(name)))
        except UndefinedError as error:
            self.failed.setdefault(str(error).removeprefix("A captured exception marker was tripped: "), []).append(name)
            return []

    def failures(self):
        return [f"{', '.join(names)} can't be evaluated: {reason}" for reason, names in self.failed.items()]


def secret_errors(values, inventory):
    known = list(values.get("secret_names", []))
    given = sorted(name for name in values.names if name.startswith("secret_") and name != "secret_names")
    missing = [name for name in known if name not in values]
    sentences, texts = [], {}
    for name in given:
        if name not in known and (near := misspelt(name, missing, 2)):
            sentences.append(f"{name} is not a secret of inventories/common; did you mean {near}, which is missing?")
        if wrong := values.errors_of(name, lambda value, name=name: mistyped(name, {"type": "str", "no_log": True}, value)):
            sentences += wrong
        elif name in known and not any(name in names for names in values.failed.values()):
            texts[name] = values.get(name)
    for one, other in combinations(texts, 2):
        if texts[one] == texts[other]:
            sentences.append(f"{one} and {other} are the same; each secret must be different.")
    # The application reads SECRET_KEY, so a value in app_environment replaces secret_django_key.
    environment = values.get("app_environment") if "app_environment" in values else None
    own_key = environment.get("SECRET_KEY") if isinstance(environment, Mapping) else None
    sentences += [
        f"SECRET_KEY of app_environment and {name} are the same; each secret must be different."
        for name, text in texts.items()
        if text == own_key and name != "secret_django_key"
    ]
    if missing:
        playbook = shortest(COLLECTION / "playbooks" / "ops" / "create_secrets.yml")
        sentences.append(f"Secrets are missing: {', '.join(missing)}. Generate them: ansible-playbook -i {inventory} {playbook}")
    return sentences


def shortest(path):
    """Return a path for an error message, relative to the working directory if possible."""
    path = Path(path)
    return path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path


def specified(name, spec, value):
    """Return the errors in a value according to its spec. `url_schemes` are the schemes of a URL."""
    wrong = list(mistyped(name, spec, value))
    if not wrong and "url_schemes" in spec:
        wrong = [error for error in [url_error(name, value, spec["url_schemes"])] if error]
    return wrong


def environment_errors(values):
    """Yield an error for each name in app_environment that the application does not read."""
    known = values.get("app_environment_names") or []
    given = values.get("app_environment") or {}
    for name in sorted(given) if known and isinstance(given, Mapping) else ():
        if name not in known:
            hint = did_you_mean(name, known) or "; app_environment_names lists the names that it reads."
            yield f"app_environment has {name}, which the application does not read{hint}"


def common_variable_errors(values, inventory_dir, sources):
    """Return the errors in a host's variables from inventories/common: in names, secrets and types.

    A team that replaces application.yml can define its own variable names in that file.
    """
    # Ansible loads the variables of every inventory after -i. In Molecule scenarios, the link and the hosts are in different
    # inventories.
    known = common_names([inventory_dir, *sources])
    if known is None:
        return [
            "The inventory has no folder group_vars/all/00-common: link inventories/common there, as docs/new-environment.md shows."
        ]
    sentences = []
    for name in sorted(name for name in values.names if name.startswith(PREFIXES) and name not in known):
        hint = did_you_mean(name, sorted(known)) or ". Declare your own variables in inventories/common/application.yml."
        sentences.append(f"{name} is not a variable of inventories/common{hint}")
    sentences += secret_errors(values, " -i ".join(str(shortest(source)) for source in sources))
    # Without the secrets, most variables can't be evaluated.
    if sentences := sentences + values.failures():
        return sentences
    for specs in (values.get(name) or {} for name in SPECIFICATIONS):
        for name, spec in specs.items():
            if name in values:
                sentences += values.errors_of(name, lambda value, name=name, spec=spec: specified(name, spec, value))
    if not sentences and "app_environment" in values:
        sentences += values.errors_of("app_environment", lambda _: environment_errors(values))
    return sentences + values.failures()


def layer_variable_errors(values, group_names):
    """Return the errors of a host's role variables according to the argument specs, before an expression uses these variables."""
    sentences = []
    for role in (role for group in ("all", *group_names) for role in ROLES.get(group, ())):
        options = role_options(COLLECTION / "roles" / role)
        for name in sorted(name for name in values.names if name.startswith(f"{role}_")):
            if name in options:
                sentences += values.errors_of(name, lambda value, name=name, option=options[name]: mistyped(name, option, value))
            else:
                sentences.append(misnamed(name, role, options))
    return sentences + values.failures()


# Versions


def distribution_errors(values):
    """Return errors for versions that the broker's distribution does not ship, if the distribution is the source."""
    platform = values.get("host_platform")
    row = values.get("wiring_versions", {}).get(platform, {})
    if row.get("source") != "distribution":
        return []
    sentences = []
    for program, title, otherwise in (
        ("rabbitmq", "RabbitMQ", "set rabbitmq_source to team_rabbitmq for another version"),
        ("erlang", "Erlang", "use that version"),
    ):
        version, source = values.get(f"{program}_version"), values.get(f"{program}_source", "automatic")
        parts, shipped = version.split("."), row[program].split(".")
        length = min(len(parts), len(shipped))
        if source in ("automatic", "distribution") and all(map(str.isdigit, parts)) and parts[:length] != shipped[:length]:
            sentences.append(
                f"{program}_version is {version}, and {platform} (host_platform) has {title} {row[program]}: {otherwise}, or set "
                "host_platform to the host's platform."
            )
    return sentences


@pass_context
def inventory_errors(context, names):
    """Return all errors for one host of an inventory. `names` are the names of the host's variables.

    Each check assumes that the earlier checks found no error. So the result has only the errors of the first check that fails.
    """
    host, groups, group_names = (context.resolve(name) for name in ("inventory_hostname", "groups", "group_names"))
    values = Values(context, names)
    return (
        group_errors(groups)
        or common_variable_errors(values, context.resolve("inventory_dir"), context.resolve("ansible_inventory_sources"))
        or layer_variable_errors(values, group_names)
        or host_count_errors(host, groups, values)
        + monitoring_errors(host, groups, values)
        + (distribution_errors(values) if "broker" in group_names else [])
    )


class FilterModule:
    def filters(self):
        return {"inventory_errors": inventory_errors}
