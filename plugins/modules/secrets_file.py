"""Documentation of the action plugin secrets_file, which runs on the controller."""

DOCUMENTATION = r"""
module: secrets_file
short_description: Adds generated secrets to a variables file
description:
  - Adds each of I(names) that is not in the file, with 40 random letters and digits. Nothing else in the file is changed.
  - An encrypted file is encrypted again with the same vault password and vault ID.
  - A new file is encrypted if Ansible has a vault password.
  - The file is replaced atomically by a file with mode 0600, so a killed run leaves either the old or the new file.
  - The plugin runs on the controller. The result contains no secret.
options:
  path: {description: The file., type: path, required: true}
  names: {description: Names of the secrets., type: list, elements: str, required: true}
  values: {description: Fixed values for some of the names., type: dict, default: {}}
author: The maintainers of this bundle
"""

EXAMPLES = r"""
- name: Generate missing secrets
  django_celery.stack.secrets_file:
    path: group_vars/all/91-secrets.yml
    names: [secret_django_key, secret_postgresql_app_password]
"""

RETURN = r"""
added: {description: Names of the secrets that were generated., type: list, returned: always}
"""
