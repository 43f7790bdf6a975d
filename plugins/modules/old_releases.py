#!/usr/bin/python
"""Remove releases of an application that are no longer needed."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.releases import remove_old

DOCUMENTATION = r"""
module: old_releases
short_description: Remove releases of an application that are no longer needed
version_added: 0.1.0
description:
  - Keeps the current release, the releases that a process uses, and the complete releases that were activated last. Removes the
    others, and their environment files.
  - A release is complete if it contains the file C(.complete) and has an environment file. The time of C(.complete) is the time of
    the last activation.
  - Only Linux shows which release a process uses.
options:
  directory:
    description: The folder of the releases.
    type: path
    required: true
  environments:
    description: The folder of the environment files. A file has the name of its release.
    type: path
    required: true
  current:
    description: The path of the current release.
    type: path
    required: true
  kept:
    description: The number of complete releases that stay, including the current one. Releases in use are not counted.
    type: int
    required: true
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Keep three releases
  django_celery.stack.old_releases:
    directory: /opt/mailroom/releases
    environments: /etc/mailroom/environments
    current: /opt/mailroom/releases/5e398af7a47e
    kept: 3
"""

RETURN = r"""
removed:
  description: The names of the removed releases.
  type: list
  elements: str
  returned: always
  sample: [0c1d2e3f4a5b]
complete:
  description: The names of the complete releases that stay, from the last activated one to the first.
  type: list
  elements: str
  returned: always
  sample: [5e398af7a47e, 7f6e5d4c3b2a]
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "environments": {"type": "path", "required": True},
            "current": {"type": "path", "required": True},
            "kept": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    options = module.params
    result = remove_old(options["directory"], options["environments"], options["current"], options["kept"], module.check_mode)
    module.exit_json(changed=bool(result["removed"]), **result)


if __name__ == "__main__":
    main()
