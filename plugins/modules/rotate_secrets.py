"""Documentation of the action plugin rotate_secrets, which runs on the controller."""

DOCUMENTATION = r"""
module: rotate_secrets
short_description: Replaces generated secrets in a variables file
description:
  - Replaces secrets by 40 random letters and digits. The file keeps the old value of C(secret_x) as C(secret_x_old) until
    I(rotate) is C(finish). A secret with an old value is not replaced again, so a repeated run changes nothing.
  - An encrypted file is encrypted again with the same vault password and vault ID. Nothing else in the file is changed.
  - The file is replaced atomically, so a killed run leaves either the old or the new file.
  - The plugin runs on the controller. The result contains no secret.
options:
  path: {description: The file., type: path, required: true}
  inventory:
    description: The directory of the inventory. A secret that another file there sets is an error.
    type: path
    required: true
  rotate:
    description: C(all), names of secrets, kinds of secrets, C(certificates), or C(finish), which removes the old values.
    type: list
    elements: str
    required: true
  emergency:
    description: Whether to keep no old value. Then secrets with an old value are replaced too.
    type: bool
    default: false
  names: {description: Names of all secrets of the inventory., type: list, elements: str, required: true}
  overlapping:
    description: Names of the secrets whose old value, C(secret_x_old), the application accepts too.
    type: list
    elements: str
    default: []
author: The maintainers of this bundle
"""

EXAMPLES = r"""
- name: Replace the passwords of the database
  django_celery.stack.rotate_secrets:
    path: group_vars/all/91-secrets.yml
    inventory: "{{ inventory_dir }}"
    rotate: [database]
    names: "{{ secret_names }}"
"""

RETURN = r"""
names: {description: Names of the secrets that were replaced or whose old value was removed., type: list, returned: always}
earlier: {description: Names of the secrets that an earlier run replaced., type: list, returned: always}
certificates: {description: Whether I(rotate) includes the certificates of services., type: bool, returned: always}
stops: {description: "The effects when the old values become invalid, one sentence per secret.", type: list, returned: always}
stays: {description: "What still works with the old values, one sentence per secret.", type: list, returned: always}
"""
