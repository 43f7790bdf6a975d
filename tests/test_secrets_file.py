"""Tests that the action secrets_file adds missing secrets, and keeps a file's entries, order, comments and encryption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.django_celery.stack.plugins.action import secrets_file
from ansible_collections.django_celery.stack.plugins.modules import secrets_file as documentation
from helpers import MARK, ROOT

SECRET = VaultSecret(b"the team's password")
VAULT = VaultLib([("prod", VaultSecret(b"another")), ("default", SECRET)])
NO_VAULT = VaultLib()
OWN = f"""\
---
# The provider's.
secret_smtp_password: "{MARK}: #1"   # renewed in May
secret_one: {MARK}one
secret_list:
- {MARK}a
secret_inline: !vault |
  $ANSIBLE_VAULT;1.1;AES256
  3030

# The end.
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "all" / "91-secrets.yml"


def write(file, content):
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(0o600)


def generated(text):
    return {name: value for name, value in secrets_file.entries(text) if "secret_one" not in name}


def test_new_file_has_all_names_and_mode_0600(file):
    assert secrets_file.add_secrets(file, ["secret_one", "secret_two"], NO_VAULT) == (["secret_one", "secret_two"], True)
    values = yaml.safe_load(file.read_text())
    assert list(values) == ["secret_one", "secret_two"]
    assert len(set(values.values())) == 2
    assert all(len(value) == 40 and value.isalnum() for value in values.values())
    assert file.stat().st_mode & 0o777 == 0o600


def test_existing_content_stays_and_missing_secrets_are_added(file):
    write(file, OWN)
    assert secrets_file.add_secrets(file, ["secret_two", "secret_one"], NO_VAULT) == (["secret_two"], True)
    assert file.read_text().startswith(OWN)
    assert [line.split(":")[0] for line in file.read_text().removeprefix(OWN).splitlines()] == ["secret_two"]


def test_second_run_changes_nothing(file):
    secrets_file.add_secrets(file, ["secret_one"], NO_VAULT)
    before = (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns)
    assert secrets_file.add_secrets(file, ["secret_one"], NO_VAULT) == ([], False)
    assert (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns) == before


def test_new_file_is_encrypted_if_ansible_has_a_vault_password(file):
    vault = VaultLib([("default", SECRET)])
    assert secrets_file.add_secrets(file, ["secret_one"], vault) == (["secret_one"], True)
    assert list(yaml.safe_load(vault.decrypt(file.read_bytes()))) == ["secret_one"]
    assert secrets_file.add_secrets(file, ["secret_one"], vault) == ([], False)


def test_unencrypted_file_stays_unencrypted(file):
    write(file, OWN)
    secrets_file.add_secrets(file, ["secret_two"], VAULT)
    assert file.read_text().startswith(OWN)


@pytest.mark.parametrize("vault_id", [None, "prod"])
def test_encrypted_file_stays_encrypted_with_the_same_password_and_id(file, vault_id):
    write(file, VAULT.encrypt(OWN, secret=SECRET, vault_id=vault_id))
    header = file.read_bytes().splitlines()[0]
    assert secrets_file.add_secrets(file, ["secret_one", "secret_two"], VAULT) == (["secret_two"], True)
    assert file.read_bytes().splitlines()[0] == header
    assert header == (b"$ANSIBLE_VAULT;1.2;AES256;prod" if vault_id else b"$ANSIBLE_VAULT;1.1;AES256")
    assert VaultLib([("default", SECRET)]).decrypt(file.read_bytes()).decode().startswith(OWN)
    encrypted = file.read_bytes()
    assert secrets_file.add_secrets(file, ["secret_one", "secret_two"], VAULT) == ([], False)
    assert file.read_bytes() == encrypted


@pytest.mark.parametrize(
    ("vault", "sentence"),
    [
        (NO_VAULT, "is encrypted, and Ansible has no vault password: add --ask-vault-pass or --vault-password-file"),
        (VaultLib([("default", VaultSecret(b"another"))]), "is encrypted, and none of Ansible's vault passwords decrypts it"),
    ],
)
def test_without_the_vault_password_nothing_is_written(file, vault, sentence):
    content = VAULT.encrypt(OWN, secret=SECRET)
    write(file, content)
    with pytest.raises(secrets_file.NotAdded, match=f"^{sentence}$"):
        secrets_file.add_secrets(file, ["secret_two"], vault)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "text",
    [
        "a: 1",
        "a: 1\n\n",
        "---\n",
        "# nothing yet\n",
        "  a: 1\n  b: 2\n",
        "a: |+\n  kept\n\n",
        "b: &b {c: 1}\na: *b\n",
        "a: 1\r\nb: 2\r\n",
        "a: 'ü'\n",
    ],
)
def test_secrets_are_added_to_supported_texts(text):
    old = [(name, value) for name, value in secrets_file.entries(text)]
    longer = secrets_file.added(text, {"secret_two": "x"})
    assert longer.startswith(text)
    assert secrets_file.entries(longer)[:-1] == old
    assert secrets_file.entries(longer)[-1][0] == "secret_two"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{a: 1}\n", "can't be changed"),
        ("a: 1\n...\n", "can't be changed"),
        ("- a\n", "is not a mapping"),
        (f"a: {MARK}\n b: 1\n", r"is not valid YAML \(line 2\)"),
    ],
)
def test_unsupported_file_is_not_changed(file, text, reason):
    write(file, text)
    with pytest.raises(secrets_file.NotAdded, match=reason) as caught:
        secrets_file.add_secrets(file, ["secret_two"], NO_VAULT)
    assert MARK not in str(caught.value)
    assert file.read_text() == text


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_run_loses_nothing_and_the_next_run_completes_it(file, monkeypatch, step):
    write(file, OWN)

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, killed)
        with pytest.raises(KeyboardInterrupt):
            secrets_file.add_secrets(file, ["secret_two"], NO_VAULT)
    assert file.read_text() == OWN
    # Ansible ignores hidden files in group_vars.
    assert [path.name for path in file.parent.iterdir() if path != file] == [".91-secrets.yml.new"]
    assert secrets_file.add_secrets(file, ["secret_two"], NO_VAULT) == (["secret_two"], True)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text().startswith(OWN)


@pytest.mark.parametrize("name", ["91-secrets.yml", ".91-secrets.yml.new"])
def test_git_ignores_the_file_and_leftovers_of_a_killed_run(name):
    command = ["git", "check-ignore", "--quiet", f"inventories/staging/group_vars/all/{name}"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_new_file_is_never_readable_by_others(file, monkeypatch):
    write(file, OWN)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(oct(os.fstat(descriptor).st_mode & 0o777)))
    old = os.umask(0)
    try:
        secrets_file.add_secrets(file, ["secret_two"], NO_VAULT)
    finally:
        os.umask(old)
    assert modes[0] == "0o600"


def test_file_that_others_can_read_gets_a_safe_mode(file):
    write(file, OWN)
    file.chmod(0o644)
    assert secrets_file.add_secrets(file, ["secret_one"], NO_VAULT, check=True) == ([], True)
    assert file.stat().st_mode & 0o777 == 0o644
    assert secrets_file.add_secrets(file, ["secret_one"], NO_VAULT) == ([], True)
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, OWN)


def test_link_to_the_file_stays_a_link(file, tmp_path):
    elsewhere = tmp_path / "elsewhere.yml"
    elsewhere.write_text(OWN)
    file.parent.mkdir()
    file.symlink_to(elsewhere)
    secrets_file.add_secrets(file, ["secret_two"], NO_VAULT)
    assert file.is_symlink()
    assert "\nsecret_two: " in elsewhere.read_text()


def test_check_mode_writes_nothing(file):
    assert secrets_file.add_secrets(file, ["secret_one"], NO_VAULT, check=True) == (["secret_one"], True)
    assert not file.parent.exists()


# The action, without a playbook


def run(options, vault=NO_VAULT, check_mode=False):
    """Returns the result of the action for these options."""
    task = SimpleNamespace(args=options, action="secrets_file", check_mode=check_mode, async_val=0, environment=[], diff=False)
    loader = SimpleNamespace(_vault=vault)
    action = secrets_file.ActionModule(task, mock.Mock(), mock.Mock(), loader, mock.Mock(), mock.Mock())
    return action.run(task_vars={})


def test_the_action_returns_the_names_without_the_secrets(file):
    options = {"path": str(file), "names": ["secret_one", "secret_two"]}
    assert run(options, check_mode=True) == {"changed": True, "added": ["secret_one", "secret_two"]}
    assert not file.exists()
    assert run(options) == {"changed": True, "added": ["secret_one", "secret_two"]}
    assert list(yaml.safe_load(file.read_text())) == ["secret_one", "secret_two"]
    assert run(options) == {"changed": False, "added": []}


def test_the_action_uses_the_vault_passwords_that_ansible_was_given(file):
    write(file, VAULT.encrypt(OWN, secret=SECRET))
    assert run({"path": str(file), "names": ["secret_two"]}, VAULT) == {"changed": True, "added": ["secret_two"]}
    assert VAULT.decrypt(file.read_bytes()).decode().startswith(OWN)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- a\n", "is not a mapping of names to values"),
        (f"a: {MARK}".encode() + b"\xff", "can't be read or written: it is not UTF-8"),
        (None, "can't be read or written: Is a directory"),
    ],
)
def test_the_action_names_the_file_and_the_reason(file, content, reason):
    if content is None:
        file.mkdir(parents=True)
    else:
        write(file, content)
    with pytest.raises(AnsibleActionFail) as caught:
        run({"path": str(file), "names": ["secret_two"]})
    assert str(caught.value) == f"{file} {reason}. Nothing was changed."


def test_the_action_accepts_the_options_that_its_module_documents():
    documented = yaml.safe_load(documentation.DOCUMENTATION)["options"]
    with (
        mock.patch.object(secrets_file.ActionModule, "validate_argument_spec", side_effect=KeyboardInterrupt) as validate,
        pytest.raises(KeyboardInterrupt),
    ):
        run({})
    for option in documented.values():
        del option["description"]
    assert validate.call_args.args == (documented,)


@pytest.mark.parametrize("options", [{}, {"path": "x"}, {"path": "x", "names": ["a"], "length": 8}])
def test_the_action_refuses_other_options(options):
    with pytest.raises(AnsibleError):
        run(options)


# The playbook


def create_secrets(inventory, *arguments):
    """Runs create_secrets.yml from another folder and without ansible.cfg."""
    program = Path(sys.executable).parent / "ansible-playbook"
    command = [program, "-i", inventory, ROOT / "playbooks/ops/create_secrets.yml", "--diff", "-vvv", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return subprocess.run(command, cwd=inventory.parent, env=environment, capture_output=True, text=True, check=False)


def test_playbook_adds_to_an_encrypted_file_and_shows_no_secret(tmp_path):
    inventory = tmp_path / "inventory"
    everybody = inventory / "group_vars" / "all"
    everybody.mkdir(parents=True)
    (everybody / "00-common").symlink_to(ROOT / "inventories/common")
    (everybody / "30-own.yml").write_text(f"secret_app_api_key: {MARK}elsewhere\n")
    (inventory / "hosts.yml").write_text("broker: {hosts: {mq.invalid: , mq2.invalid: }}\n")
    file, password = everybody / "91-secrets.yml", tmp_path / "password"
    file.write_bytes(VAULT.encrypt(OWN, secret=SECRET))
    password.write_bytes(SECRET.bytes)

    done = create_secrets(inventory, "--vault-password-file", password)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=1" in done.stdout
    text = VAULT.decrypt(file.read_bytes()).decode()
    assert text.startswith(OWN)
    new = yaml.safe_load(text.removeprefix(OWN))
    names = yaml.safe_load((ROOT / "inventories/common/wiring.yml").read_text())["secret_names"]
    # Another file sets secret_app_api_key, so the playbook does not generate it.
    assert list(new) == [name for name in names if name != "secret_app_api_key"]
    assert [value for value in [*new.values(), MARK] if value in done.stdout + done.stderr] == []

    encrypted = file.read_bytes()
    done = create_secrets(inventory, "--vault-password-file", password)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout
    assert file.read_bytes() == encrypted

    done = create_secrets(inventory)
    assert done.returncode != 0
    sentence = f"{file} is encrypted, and Ansible has no vault password: add --ask-vault-pass or --vault-password-file."
    assert sentence in done.stderr + done.stdout
    assert file.read_bytes() == encrypted
