"""Tests that `make environment` creates an environment that passes the first play, and that Ansible finds its vault password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from helpers import ROOT, load, wiring

program = load("scripts/create_environment.py")
SPLIT = (
    "broker=mq1.example.com database=db1.example.com web=w1.example.com,w2.example.com workers=admin@k1:2222 flower=mq1.example.com"
)


@pytest.fixture
def create(tmp_path):
    """Runs the command without a terminal; returns the exit code and the output."""

    def run(*arguments):
        words = ["--inventories", tmp_path / "inventories", "--passwords", tmp_path / "passwords", *arguments]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/create_environment.py", *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def ansible(name, folder, *arguments):
    """Runs a program of Ansible from another folder, without ansible.cfg and without a vault option."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    command = [Path(sys.executable).with_name(name), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def debug(folder, *arguments):
    return ansible("ansible", folder, "--playbook-dir", ROOT / "playbooks", "-m", "ansible.builtin.debug", *arguments)


# The whole command


@pytest.mark.parametrize("where", [("--host", "server.example.com"), ("--hosts", SPLIT, "--domain", "mail.example.com")])
def test_environment_passes_the_first_play_from_any_folder(create, tmp_path, where):
    code, output = create("--name", "staging", *where)
    assert code == 0, output
    done = ansible("ansible-playbook", tmp_path, "-i", tmp_path / "inventories/staging", ROOT / "playbooks/validate.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " failed=0 " in done.stdout
    assert "[WARNING]" not in done.stderr


def test_secrets_are_complete_encrypted_and_in_no_output(create, tmp_path):
    code, output = create("--name", "staging", "--host", "server.example.com")
    assert code == 0, output
    file, password = tmp_path / "inventories/staging/group_vars/all/91-secrets.yml", tmp_path / "passwords/staging.password"
    assert (file.stat().st_mode & 0o777, password.stat().st_mode & 0o777) == (0o600, 0o600)
    secret = password.read_text().strip()
    values = yaml.safe_load(VaultLib([("default", VaultSecret(secret.encode()))]).decrypt(file.read_bytes()))
    assert list(values) == wiring()["secret_names"]
    assert [value for value in [secret, *values.values()] if value in output] == []
    assert len(secret) > 40


def test_output_tells_the_next_commands_and_how_to_read_a_secret(create, tmp_path):
    code, output = create("--name", "staging", "--hosts", SPLIT, "--domain", "mail.example.com")
    assert code == 0, output
    assert "ansible-playbook -i inventories/staging site.yml\n" in output
    assert "https://mail.example.com/ " in output
    assert "ssh -L 5555:127.0.0.1:5555 mq1.example.com" in output
    assert "https://localhost:15671/ after: ssh -L 15671:127.0.0.1:15671 mq1.example.com" in output
    (command,) = [line.split("ansible ")[1] for line in output.splitlines() if "-a var=secret" in line]
    words = command.replace("'", "").split()
    done = ansible("ansible", tmp_path, "--playbook-dir", ROOT / "playbooks", *words)
    assert '"secret_app_admin_password": "' in done.stdout, done.stdout + done.stderr


def test_second_run_changes_nothing_and_a_missing_file_is_created(create, tmp_path):
    assert create("--name", "staging", "--host", "server.example.com")[0] == 0
    hosts = tmp_path / "inventories/staging/hosts.yml"
    hosts.write_text(hosts.read_text() + "# edited\n")
    before = contents(tmp_path)
    code, output = create("--name", "staging")
    assert code == 0, output
    assert contents(tmp_path) == before
    assert "created" not in output and f"exists   {Path('inventories/staging/hosts.yml')}" in output
    hosts.unlink()
    code, output = create("--name", "staging", "--host", "other.example.com")
    assert code == 0, output
    assert [line for line in output.splitlines() if line.startswith("created")] == ["created  inventories/staging/hosts.yml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--host", "b.example.com"), "hosts.yml exists, so HOST would have no effect. Edit the file instead."),
        (("--domain", "b.example.com", "--mail", "smtp://b"), "30-staging.yml exists, so DOMAIN, MAIL would have no effect."),
    ],
)
def test_existing_files_are_not_overwritten(create, tmp_path, arguments, sentence):
    assert create("--name", "staging", "--host", "server.example.com")[0] == 0
    before = contents(tmp_path)
    code, output = create("--name", "staging", *arguments)
    assert code == 1 and sentence in output
    assert contents(tmp_path) == before


def test_foreign_inventory_and_lost_password_are_refused(create, tmp_path):
    foreign = tmp_path / "inventories/sandbox"
    foreign.mkdir(parents=True)
    code, output = create("--name", "sandbox", "--host", "server.example.com")
    assert code == 1 and "sandbox exists, and this command did not create it. Use another NAME." in output
    assert list(foreign.iterdir()) == []
    assert create("--name", "staging", "--host", "server.example.com")[0] == 0
    (tmp_path / "passwords/staging.password").unlink()
    code, output = create("--name", "staging")
    assert code == 1 and "does not exist. Restore your copy of this file." in output
    assert not (tmp_path / "passwords/staging.password").exists()


def test_git_tracks_the_encrypted_secrets_only(create, tmp_path):
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert create("--name", "staging", "--host", "server.example.com")[0] == 0
    other = tmp_path / "inventories/sandbox/group_vars/all/91-secrets.yml"
    other.parent.mkdir(parents=True)
    other.write_text("plain: 1\n")
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert [name for name in listed.stdout.split() if "secrets" in name] == ["inventories/staging/group_vars/all/91-secrets.yml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "NAME is missing. Without a terminal, set it on the command line: NAME=…"),
        (("--name", "staging"), "HOST is missing. Without a terminal, set it on the command line: HOST=…"),
        (("--name", "Staging"), "NAME is 'Staging'; allowed: lower-case letters, digits and hyphens, such as staging."),
        (("--name", "a", "--host", "192.0.2.7"), "DOMAIN is '192.0.2.7'; allowed: a domain name, such as mail.example.com."),
        (("--name", "a", "--host", "b", "--hosts", SPLIT), "HOST and HOSTS are both set; allowed: one."),
        (("--name", "a", "--host", SPLIT), "allowed: one host. For several, use HOSTS."),
        (
            ("--name", "a", "--host", "b.c", "--topology", "cluster"),
            "TOPOLOGY is 'cluster', but HOSTS has 1 for broker; a cluster has three, or a larger odd number.",
        ),
        (("--name", "a", "--host", "b.c", "--topology", "mesh"), "TOPOLOGY is 'mesh'; allowed: single and cluster."),
        (
            ("--name", "a", "--host", "b.example.com", "--platform", "el8"),
            "PLATFORM is 'el8'; allowed: debian13, ubuntu2404, el9, el10.",
        ),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_created(create, tmp_path, arguments, sentence):
    code, output = create(*arguments)
    assert code == 1 and sentence in output, output
    assert contents(tmp_path) == {}


def test_cluster_has_its_brokers(create, tmp_path):
    three = SPLIT.replace("broker=mq1.example.com", "broker=mq1.example.com,mq2.example.com,mq3.example.com")
    code, output = create("--name", "a", "--hosts", three, "--topology", "cluster")
    assert code == 0, output
    written = yaml.safe_load((tmp_path / "inventories/a/hosts.yml").read_text())
    assert list(written["all"]["children"]["broker"]["hosts"]) == ["mq1.example.com", "mq2.example.com", "mq3.example.com"]


# Values


@pytest.mark.parametrize("text", ["", "a b", "-a", "a_b", "192.0.2.300", "1.2.3", "::1", "a:0", "a:70000", "@a", "a@", "a" * 64])
def test_wrong_hosts_are_refused(text):
    with pytest.raises(program.Wrong, match="allowed: a host name or an IPv4 address"):
        program.host(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SPLIT.replace("flower", "flowers"), "HOSTS has 'flowers=mq1.example.com'; allowed: one entry per group"),
        (f"{SPLIT} web=w3", "HOSTS has 'web=w3'; allowed: one entry per group"),
        ("broker=a web=a", "HOSTS lacks database, workers. Only flower and proxy are optional."),
        (
            SPLIT.replace("broker=mq1.example.com", "broker=a,b"),
            "HOSTS has 2 hosts for broker; allowed: one, three, or a larger odd",
        ),
        (SPLIT.replace("db1.example.com", "db1,db2"), "HOSTS has several hosts for database; allowed: one"),
        (
            f"{SPLIT.replace('flower=mq1.example.com', 'flower=root@k1')}",
            "HOSTS has different users or ports for k1; allowed: one.",
        ),
    ],
)
def test_wrong_groups_are_refused(text, sentence):
    with pytest.raises(program.Wrong, match=sentence):
        program.hosts(text)


def test_connection_of_a_host_is_given_once():
    groups, connections = program.hosts(SPLIT.replace("flower=mq1.example.com", "flower=k1"))
    assert groups["flower"] == groups["workers"] == ["k1"]
    assert connections["k1"] == {"ansible_user": "admin", "ansible_port": 2222}


@pytest.mark.parametrize(
    "text",
    ["mail.example.com", "http://a", "smtp://", "smtp://a:b", "smtp://a/b", "smtp://a b@c", "smtp://[::1]:25", "smtp://a:99999"],
)
def test_wrong_mail_servers_are_refused(text):
    with pytest.raises(program.Wrong, match="MAIL must be a URL such as"):
        program.mail(text)


def test_password_of_the_mail_server_comes_from_a_secret():
    with pytest.raises(program.Wrong, match="MAIL must not contain a password") as caught:
        program.mail("smtp://me:NeverShown@mail.example.com")
    assert "NeverShown" not in str(caught.value)
    assert program.mail("smtp+tls://me@a.b:587") == "smtp+tls://me:{{ secret_smtp_password | urlencode }}@a.b:587"


def test_mail_login_needs_its_secret_and_the_output_says_so(create, tmp_path):
    code, output = create("--name", "staging", "--host", "a.example.com", "--mail", "smtp+tls://me@mail.example.com:587")
    assert code == 0 and "First add the mail server's password as secret_smtp_password" in output
    done = ansible("ansible-playbook", tmp_path, "-i", tmp_path / "inventories/staging", ROOT / "playbooks/validate.yml")
    assert "'secret_smtp_password' is undefined" in done.stdout + done.stderr


def test_terminal_asks_again_after_a_wrong_answer(monkeypatch, capsys):
    answers = iter(["Staging", "staging", ""])
    monkeypatch.setattr("builtins.input", lambda _question: next(answers))
    assert program.ask("Name", program.environment_name, "") == "staging"
    assert "allowed: lower-case letters" in capsys.readouterr().out
    assert program.ask("Domain", program.domain, "a.example.com") == "a.example.com"


def test_make_ignores_variables_of_the_shell():
    options = ["--no-print-directory", "--dry-run", "--old-file", ".venv/.complete"]
    command = ["make", *options, "environment", "NAME=staging", "HOST=a.example.com"]
    # `make test` passes its own options to the make of this test.
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment = {**outer, "MAIL": "/var/mail/root", "DOMAIN": "of-the-shell"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = " ".join(done.stdout.replace("\\\n", " ").split())
    assert words.endswith("create_environment.py --name 'staging' --host 'a.example.com'")


# The inventory plugin


def test_password_is_added_after_those_of_the_command_line(tmp_path):
    """The plugin runs in this process, so that its coverage is measured."""
    (tmp_path / "password").write_text("of the file\n")
    (tmp_path / "vault.yml").write_text(program.vault_file(tmp_path / "password"))
    for given in ([], [("team", VaultSecret(b"of the command line"))]):
        loader = DataLoader()
        loader.set_vault_secrets(secrets := list(given))
        InventoryManager(loader=loader, sources=[str(tmp_path)])
        assert [(name, secret.bytes) for name, secret in secrets[len(given) :]] == [("default", b"of the file")]
    (tmp_path / "password").unlink()
    for given in ([], [("team", VaultSecret(b"of the command line"))]):
        loader = DataLoader()
        loader.set_vault_secrets(secrets := list(given))
        InventoryManager(loader=loader, sources=[str(tmp_path)])
        assert secrets == given


@pytest.fixture
def two_environments(create, tmp_path):
    for name in ("one", "two"):
        assert create("--name", name, "--host", f"{name}.example.com")[0] == 0
    return tmp_path


def test_each_environment_has_its_own_vault_password(two_environments):
    passwords = [(two_environments / f"passwords/{name}.password").read_text() for name in ("one", "two")]
    assert passwords[0] != passwords[1]
    sources = [word for name in ("one", "two") for word in ("-i", two_environments / "inventories" / name)]
    for words in (sources[:2], sources[2:], sources):
        done = debug(two_environments, *words, "-a", "var=secret_app_api_key", "all")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stderr


def test_single_encrypted_values_are_decrypted_too(two_environments):
    secret = VaultSecret((two_environments / "passwords/one.password").read_bytes().strip())
    value = VaultLib([("default", secret)]).encrypt(b"text").decode()
    lines = "".join(f"  {line}\n" for line in value.splitlines())
    (two_environments / "inventories/one/group_vars/all/40-own.yml").write_text(f"secret_own: !vault |\n{lines}")
    done = debug(two_environments, "-i", two_environments / "inventories/one", "-a", "var=secret_own", "all")
    assert json.loads(done.stdout.partition("=>")[2]) == {"secret_own": "text"}, done.stderr


def test_missing_password_file_is_named_unless_the_command_line_has_the_password(two_environments):
    file = two_environments / "passwords/one.password"
    elsewhere = file.rename(two_environments / "elsewhere")
    words = (two_environments, "-i", two_environments / "inventories/one", "-a", "var=secret_app_api_key", "all")
    done = debug(*words)
    assert done.returncode != 0
    assert f"The vault password file {file} does not exist. Copy it from another controller." in " ".join(done.stderr.split())
    done = debug(*words, "--vault-password-file", elsewhere)
    assert done.returncode == 0 and "does not exist" not in done.stderr
