"""Returns the hosts of a play if Ansible can read the inventory's file of secrets.

Ansible evaluates a play's hosts before it loads variables. If it can't decrypt a variables file, its error does not name the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleLookupError
from ansible.parsing.vault import is_encrypted_file
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: readable_secrets
short_description: Return hosts, unless a file of secrets is encrypted and Ansible has no vault password
description:
  - Returns its terms. Fails if C(group_vars/all/91-secrets.yml) of an inventory is encrypted and Ansible has no vault password.
    The error names the file and the missing option.
options:
  _terms: {description: The host pattern of the play., required: true}
author: The maintainers of this bundle
"""


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        for source in map(Path, context.CLIARGS.get("inventory") or ()):
            file = (source if source.is_dir() else source.parent) / "group_vars" / "all" / "91-secrets.yml"
            if not self._loader._vault.secrets and file.is_file():
                with file.open("rb") as content:
                    encrypted = is_encrypted_file(content)
                if encrypted:
                    raise AnsibleLookupError(
                        f"{file} is encrypted, and Ansible has no vault password: add --ask-vault-pass or --vault-password-file."
                    )
        return terms
