"""Creates an environment: a directory in inventories/ with hosts, variables, and encrypted secrets. `make environment` runs it.

In a terminal, it prompts for each value that is not on the command line. It never changes existing files, so it can be run again.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
PASSWORDS = Path("~/.config/django_celery.stack")
PLATFORMS = ("debian13", "ubuntu2404", "el9", "el10")
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
GROUPS = ("broker", "database", "web", "workers", "flower", "proxy")
OPTIONAL_GROUPS = ("flower", "proxy")
SCHEMES = ("smtp", "smtp+tls", "smtp+ssl")

Hosts = dict[str, list[str]]
Connections = dict[str, dict[str, str | int]]


class Wrong(Exception):
    """A value is not allowed. The text is a sentence that names the value and what is allowed."""


def environment_name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", text):
        raise Wrong(f"NAME is {text!r}; allowed: lower-case letters, digits and hyphens, such as staging.")
    return text


def host(text: str) -> tuple[str, dict[str, str | int]]:
    """Return the name of a host, and the variables for its connection."""
    wrong = Wrong(f"The host is {text!r}; allowed: a host name or an IPv4 address, as [USER@]HOST[:PORT].")
    found = re.fullmatch(r"(?:([a-z_][\w-]*)@)?([^:@]+)(?::(\d{1,5}))?", text)
    if not found:
        raise wrong
    user, name, port = found.groups()
    if re.fullmatch(r"[\d.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise wrong from None
    elif len(name) > 253 or not re.fullmatch(rf"{LABEL}(\.{LABEL})*", name):
        raise wrong
    if port and not 0 < int(port) < 65536:
        raise wrong
    return name, {**({"ansible_user": user} if user else {}), **({"ansible_port": int(port)} if port else {})}


def hosts(text: str) -> tuple[Hosts, Connections]:
    """Return the hosts of each group, and the connection of each host. The text names one host, or hosts per group."""
    groups: Hosts = {}
    connections: Connections = {}
    words = text.split() if "=" in text else [f"{group}={text.strip()}" for group in GROUPS if group != "proxy"]
    for word in words:
        group, equals, names = word.partition("=")
        if not equals or group not in GROUPS or group in groups:
            raise Wrong(
                f"HOSTS has {word!r}; allowed: one entry per group, as GROUP=HOST[,HOST], with the groups {', '.join(GROUPS)}."
            )
        groups[group] = []
        for name, connection in map(host, names.split(",")):
            if connection and connections.get(name) and connections[name] != connection:
                raise Wrong(f"HOSTS has different users or ports for {name}; allowed: one.")
            connections[name] = connection or connections.get(name, {})
            groups[group].append(name)
    if missing := [group for group in GROUPS if group not in groups and group not in OPTIONAL_GROUPS]:
        raise Wrong(f"HOSTS lacks {', '.join(missing)}. Only flower and proxy are optional.")
    if len(groups["broker"]) % 2 == 0:
        raise Wrong(f"HOSTS has {len(groups['broker'])} hosts for broker; allowed: one, three, or a larger odd number.")
    if len(groups["database"]) > 1:
        raise Wrong("HOSTS has several hosts for database; allowed: one.")
    return groups, connections


def check_topology(text: str, brokers: int) -> None:
    if text not in ("single", "cluster"):
        raise Wrong(f"TOPOLOGY is {text!r}; allowed: single and cluster.")
    if (text == "cluster") != (brokers > 1):
        raise Wrong(f"TOPOLOGY is {text!r}, but HOSTS has {brokers} for broker; a cluster has three, or a larger odd number.")


def domain(text: str) -> str:
    if len(text) > 253 or not re.fullmatch(rf"({LABEL}\.)+[a-z]{LABEL}", text):
        raise Wrong(f"DOMAIN is {text!r}; allowed: a domain name, such as mail.example.com.")
    return text


def mail(text: str) -> str:
    """Return the URL of the mail server. If the URL has a user, a secret contains the password."""
    wrong = Wrong(f"MAIL must be a URL such as smtp+tls://user@smtp.example.com:587, with the scheme {', '.join(SCHEMES)}.")
    try:
        url = urlsplit(text)
        name, _ = host(url.hostname or "")
        port = url.port
    except (ValueError, Wrong):
        raise wrong from None
    if url.password is not None:
        raise Wrong("MAIL must not contain a password, because others can read it. Leave it out, and add secret_smtp_password.")
    if url.scheme not in SCHEMES or url.path or url.query or url.fragment or not re.fullmatch(r"[\w.%+-]*", url.username or ""):
        raise wrong
    login = f"{url.username}:{{{{ secret_smtp_password | urlencode }}}}@" if url.username else ""
    return f"{url.scheme}://{login}{name}{f':{port}' if port else ''}"


def platform(text: str) -> str:
    if text not in PLATFORMS:
        raise Wrong(f"PLATFORM is {text!r}; allowed: {', '.join(PLATFORMS)}.")
    return text


def hosts_file(groups: Hosts, connections: Connections) -> str:
    members = {group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()}
    content = {
        "all": {
            "hosts": {name: connection or None for name, connection in connections.items()},
            "children": {
                "broker": members["broker"],
                "database": members["database"],
                "app": {"children": {"web": members["web"], "workers": members["workers"]}},
                **{group: members[group] for group in OPTIONAL_GROUPS if group in members},
            },
        }
    }
    text = yaml.safe_dump(content, sort_keys=False)
    return "---\n# The hosts of each layer. One host can be in all groups.\n" + re.sub(r": null$", ":", text, flags=re.MULTILINE)


def variables_file(name: str, domain: str, mail: str, platform: str) -> str:
    login = "\n# Add the password as secret_smtp_password to 91-secrets.yml." if "secret_smtp_password" in mail else ""
    return f"""\
---
# The variables of the environment {name}. They override those in 00-common. roles/*/README.md lists the variables of the roles.

# The platform of the hosts: {", ".join(PLATFORMS)}. It selects the versions of RabbitMQ and Erlang.
host_platform: {platform}

# The names by which clients reach the web service. It needs a proxy that terminates TLS: a host in the group proxy with
# nginx_acme_directory_url or nginx_certificate, or your own proxy, which connects to 127.0.0.1:8000 on the hosts of the group web.
app_allowed_hosts: [{domain}]
# Addresses and domains that emails may be sent from.
app_allowed_senders: ["@{domain}"]
# Additional settings of the application, see app_environment_names in 00-common/application.yml.
app_environment:
  DEFAULT_FROM_EMAIL: mailroom@{domain}

# The mail server that delivers the emails.{login}
app_email_url: "{mail}"

# Closes all ports of all hosts, except SSH and the ports that the layers need.
firewall_enabled: true
# The ports of your own proxy on the hosts of the group web.
app_firewall_rules:
  - {{ports: [80, 443]}}
"""


def vault_file(password: Path) -> str:
    return f"""\
---
# Ansible decrypts the secrets of this environment with the password in this file. Git does not track it, so keep a copy.
plugin: django_celery.stack.vault_password
file: {password}
"""


GITIGNORE = """\
# The file is encrypted, so Git can track it.
!/group_vars/all/91-secrets.yml
"""


def ask(question: str, check: Callable[[str], object], default: str) -> str:
    """Ask until the answer is allowed. An empty answer selects the default."""
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            check(answer)
        except Wrong as error:
            print(error)
        else:
            return answer


class Environment:
    """The files of an environment."""

    def __init__(self, name: str, inventories: Path, passwords: Path) -> None:
        self.name = name
        self.folder = inventories / name
        self.everybody = self.folder / "group_vars" / "all"
        self.vault = self.folder / "vault.yml"
        self.hosts = self.folder / "hosts.yml"
        self.variables = self.everybody / f"30-{name}.yml"
        self.secrets = self.everybody / "91-secrets.yml"
        self.password = passwords / f"{name}.password"
        if self.folder.exists() and not self.vault.exists():
            raise Wrong(f"{self.folder} exists, and this command did not create it. Use another NAME.")
        if self.vault.exists():
            self.password = Path(yaml.safe_load(self.vault.read_text())["file"])

    def create(self, path: Path, text: str) -> None:
        """Write a file unless it exists."""
        exists = path.exists()
        if not exists:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        print(f"{'exists' if exists else 'created':<8} {shown(path)}")

    def create_password(self) -> None:
        file = self.password.expanduser()
        if file.exists():
            print(f"exists   {self.password}")
            return
        if self.secrets.exists() and self.secrets.read_bytes().startswith(b"$ANSIBLE_VAULT;"):
            raise Wrong(f"{shown(self.secrets)} is encrypted, and {self.password} does not exist. Restore your copy of this file.")
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as content:
            content.write(secrets.token_urlsafe(32) + "\n")
        print(f"created  {self.password}")

    def ansible(self, program: str, *arguments: str | Path) -> str:
        """Run a program of Ansible with this inventory, and return its output."""
        done = subprocess.run(
            [Path(sys.executable).with_name(program), "-i", self.folder, *arguments],
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Wrong(f"{program} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def create_secrets(self) -> None:
        before = self.secrets.read_bytes() if self.secrets.exists() else b""
        self.ansible("ansible-playbook", ROOT / "playbooks/ops/create_secrets.yml")
        state = "exists" if before == self.secrets.read_bytes() else "extended" if before else "created"
        print(f"{state:<8} {shown(self.secrets)}")


def shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def login_table(environment: Environment) -> str:
    listing = json.loads(environment.ansible("ansible-inventory", "--list"))
    first = {name: group["hosts"][0] for name, group in listing.items() if group.get("hosts")}
    variables = listing["_meta"]["hostvars"]
    site = f"https://{variables[first['web']]['app_allowed_hosts'][0]}"

    def tunnel(port: int, group: str, scheme: str = "http") -> str:
        connection = variables[first[group]]
        user = f"{connection['ansible_user']}@" if "ansible_user" in connection else ""
        ssh_port = f" -p {connection['ansible_port']}" if "ansible_port" in connection else ""
        return f"{scheme}://localhost:{port}/ after: ssh{ssh_port} -L {port}:127.0.0.1:{port} {user}{first[group]}"

    # Like wiring_tls in inventories/common: an environment with one host needs no TLS.
    used = {host for name in GROUPS if name != "proxy" for host in listing.get(name, {}).get("hosts", [])}
    broker = tunnel(15671, "broker", "https") if len(used) > 1 else tunnel(15672, "broker")
    rows = [
        ("Application", f"{site}/", "admin", "secret_app_admin_password"),
        ("API", f"{site}/api/docs", "", "secret_app_api_key"),
        ("RabbitMQ", broker, "admin", "secret_rabbitmq_administrator_password"),
        *([("Flower", tunnel(5555, "flower"), "flower", "secret_flower_password")] if "flower" in first else []),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def next_steps(environment: Environment) -> str:
    folder, file = shown(environment.folder), shown(environment.secrets)
    edit = f"ansible-vault edit --vault-password-file {environment.password} {file}"
    first = f"\nFirst add the mail server's password as secret_smtp_password:\n\n  .venv/bin/{edit}\n"
    login = "secret_smtp_password" in environment.variables.read_text()
    return f"""
Keep a copy of {environment.password}: without it, nobody can read the secrets.
{first if login else ""}
Next:

  .venv/bin/ansible-playbook -i {folder} playbooks/preflight.yml
  .venv/bin/ansible-playbook -i {folder} site.yml
  .venv/bin/ansible-playbook -i {folder} playbooks/smoke.yml -e smoke_recipient=you@example.com

Logins, each with the name of its secret:

{login_table(environment)}

Read a secret, and edit the secrets:

  .venv/bin/ansible -i {folder} 'web[0]' -m ansible.builtin.debug -a var=secret_app_admin_password
  .venv/bin/{edit}"""


def run(options: argparse.Namespace, terminal: bool) -> None:
    def value(name: str, question: str, check: Callable[[str], object], default: str = "") -> str:
        given: str | None = getattr(options, name)
        if given is not None:
            check(given)
            return given
        if terminal:
            return ask(question, check, default)
        if not default:
            raise Wrong(f"{name.upper()} is missing. Without a terminal, set it on the command line: {name.upper()}=…")
        check(default)
        return default

    name = value("name", "Name of the environment, such as staging", environment_name)
    environment = Environment(name, options.inventories, options.passwords)
    for file, names in (
        (environment.hosts, ("host", "hosts", "topology")),
        (environment.variables, ("domain", "mail", "platform")),
    ):
        if file.exists() and (given := [each.upper() for each in names if getattr(options, each) is not None]):
            raise Wrong(f"{shown(file)} exists, so {', '.join(given)} would have no effect. Edit the file instead.")
    if options.host is not None and options.hosts is not None:
        raise Wrong("HOST and HOSTS are both set; allowed: one.")
    if options.host is not None and "=" in options.host:
        raise Wrong(f"HOST is {options.host!r}; allowed: one host. For several, use HOSTS.")
    texts: dict[Path, str] = {}
    web = ""
    if not environment.hosts.exists():
        options.host = options.hosts if options.host is None else options.host
        groups, connections = hosts(value("host", "Host for everything, or GROUP=HOST[,HOST] per group", hosts))
        if options.topology is not None:
            check_topology(options.topology, len(groups["broker"]))
        texts[environment.hosts] = hosts_file(groups, connections)
        web = groups["web"][0]
    if not environment.variables.exists():
        texts[environment.variables] = variables_file(
            name,
            value("domain", "Domain name of the web service and of the senders", domain, web),
            mail(value("mail", "Mail server", mail, "smtp://127.0.0.1:25")),
            value("platform", f"Platform of the hosts ({', '.join(PLATFORMS)})", platform, PLATFORMS[0]),
        )

    # vault.yml comes first. If it exists, the next run completes the environment.
    environment.create(environment.vault, vault_file(environment.password))
    environment.create_password()
    environment.create(environment.folder / ".gitignore", GITIGNORE)
    for file in (environment.hosts, environment.variables):
        environment.create(file, texts.get(file, ""))
    link = environment.everybody / "00-common"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(ROOT / "inventories" / "common", environment.everybody))
    environment.create_secrets()
    print(next_steps(environment))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("name", "host", "hosts", "topology", "domain", "mail", "platform"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--inventories", type=Path, default=ROOT / "inventories")
    parser.add_argument("--passwords", type=Path, default=PASSWORDS)
    try:
        run(parser.parse_args(), sys.stdin.isatty())
    except Wrong as error:
        sys.exit(str(error))
    except (EOFError, KeyboardInterrupt):
        sys.exit("\nStopped. Run the command again to continue.")


if __name__ == "__main__":
    main()
