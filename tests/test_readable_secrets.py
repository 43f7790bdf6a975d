"""Tests that the lookup readable_secrets returns a play's hosts unless the file is encrypted and Ansible has no vault password."""

from __future__ import annotations

import pytest
from ansible import context
from ansible.errors import AnsibleLookupError
from ansible.module_utils.common.collections import ImmutableDict
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible.plugins.loader import lookup_loader
from helpers import MARK

SECRETS = [("default", VaultSecret(b"the team's password"))]
PLAIN = f"secret_one: {MARK}\n".encode()
ENCRYPTED = VaultLib(SECRETS).encrypt(PLAIN)


@pytest.fixture
def inventory(tmp_path):
    """The folder of an inventory. Each test writes the file of secrets."""
    (tmp_path / "group_vars/all").mkdir(parents=True)
    (tmp_path / "hosts.yml").touch()
    return tmp_path


@pytest.fixture
def hosts(monkeypatch):
    """Returns the hosts that the lookup returns for these inventories and vault passwords."""

    def look_up(inventories, secrets=()):
        monkeypatch.setattr(context, "CLIARGS", ImmutableDict(inventory=inventories and tuple(map(str, inventories))))
        loader = DataLoader()
        loader.set_vault_secrets(list(secrets))
        return lookup_loader.get("django_celery.stack.readable_secrets", loader=loader).run(["all", "broker"], {})

    return look_up


def test_without_a_file_of_secrets_the_hosts_are_given(inventory, hosts):
    assert hosts([inventory]) == ["all", "broker"]
    assert hosts(None) == ["all", "broker"]


def test_a_plain_file_of_secrets_needs_no_vault_password(inventory, hosts):
    (inventory / "group_vars/all/91-secrets.yml").write_bytes(PLAIN)
    assert hosts([inventory]) == ["all", "broker"]


# Ansible finds group_vars in an inventory's folder, or next to its file.
@pytest.mark.parametrize("source", [".", "hosts.yml"])
def test_an_encrypted_file_of_secrets_needs_a_vault_password(inventory, hosts, source):
    file = inventory / "group_vars/all/91-secrets.yml"
    file.write_bytes(ENCRYPTED)
    with pytest.raises(AnsibleLookupError) as caught:
        hosts([inventory / source])
    assert str(caught.value) == (
        f"{file} is encrypted, and Ansible has no vault password: add --ask-vault-pass or --vault-password-file."
    )
    assert hosts([inventory / source], SECRETS) == ["all", "broker"]


def test_every_inventory_of_a_command_is_checked(inventory, hosts, tmp_path_factory):
    (inventory / "group_vars/all/91-secrets.yml").write_bytes(ENCRYPTED)
    with pytest.raises(AnsibleLookupError, match=str(inventory)):
        hosts([tmp_path_factory.mktemp("other"), inventory])
