"""Gives Ansible the vault password of an environment, so that no command needs --vault-password-file.

Ansible parses an inventory before it reads group_vars, so this plugin adds the password in time, for all commands that read the
inventory. Each environment can have a different password.
"""

from __future__ import annotations

from typing import Any

from ansible.parsing.vault import get_file_vault_secret
from ansible.plugins.inventory import BaseInventoryPlugin

DOCUMENTATION = r"""
name: vault_password
short_description: Read the vault password of an inventory from a file
description:
  - Adds no hosts. Adds the vault password in O(file) to Ansible's vault passwords, after those of the command line.
  - If the file is missing, the command line must give the password. Otherwise the plugin warns.
options:
  plugin:
    description: The name of this plugin.
    required: true
    choices: [django_celery.stack.vault_password]
  file:
    description: A file outside of version control with the password, or a program that prints it.
    type: path
    required: true
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
# inventories/staging/vault.yml
plugin: django_celery.stack.vault_password
file: ~/.config/django_celery.stack/staging.password
"""


class InventoryModule(BaseInventoryPlugin):
    NAME = "django_celery.stack.vault_password"

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        file = self.get_option("file")
        known = loader._vault.secrets
        if not loader.path_exists(file):
            if not known:
                # After an error, Ansible would try other plugins and print their errors too.
                self.display.warning(f"The vault password file {file} does not exist. Copy it from another controller.")
            return
        secret = get_file_vault_secret(filename=file, loader=loader)
        secret.load()
        # Values with the tag !vault are decrypted with the same list.
        known.append(("default", secret))
