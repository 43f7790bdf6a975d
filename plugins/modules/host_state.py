#!/usr/bin/python
"""Compare users, directories, files and packages of a host with a list, in one call."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.host_state import HostState
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule

DOCUMENTATION = r"""
module: host_state
short_description: Compare users, directories, files and packages on a host with lists, in one call
version_added: 0.1.0
description:
  - Creates and corrects system users, directories and files, in this order. Reports which packages are missing and which paths
    exist.
  - Each call of a module takes Ansible a quarter of a second per host. One call of this module replaces several calls of
    M(ansible.builtin.user), M(ansible.builtin.file), M(ansible.builtin.copy) and M(ansible.builtin.stat). So a run that changes
    nothing needs one call per role.
  - Installs no packages. A role calls the package manager's module only if RV(packages_missing) is not empty. If another program
    then holds the lock of dpkg, this module warns about it, except in check mode.
options:
  users:
    description: System users that can't log in. Their home directories are not created.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The user's name.
        type: str
        required: true
      group:
        description: The primary group of a new user. The default is a group of the same name.
        type: str
      home:
        description: The home directory.
        type: path
        required: true
  directories:
    description: Directories. Missing parents are created with mode 0755.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path.
        type: path
        required: true
      owner:
        description: The owner, by name or number.
        type: str
        required: true
      group:
        description: The group, by name or number. Without it, an existing directory keeps its group.
        type: str
      mode:
        description: The mode in octal digits.
        type: str
        required: true
  files:
    description: Files. Each file is replaced atomically, so that no reader sees an incomplete file.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The path. Its directory must exist or be listed in O(directories).
        type: path
        required: true
      content:
        description: The text. Set this or O(files[].secret_content).
        type: str
      secret_content:
        description: A text that does not appear in the output, the log or the diff.
        type: str
      staged:
        description:
          - Whether a changed text is written to the path with the suffix C(.new). The role then tests this file and renames it.
        type: bool
        default: false
      owner:
        description: The owner, by name or number.
        type: str
        required: true
      group:
        description: The group, by name or number.
        type: str
      mode:
        description: The mode in octal digits.
        type: str
        required: true
  packages:
    description: Packages of dpkg or rpm. Each value is a regular expression that the beginning of the version must match.
    type: dict
    default: {}
  look_at:
    description: Paths to report in RV(exists) and RV(links).
    type: list
    elements: path
    default: []
  requires:
    description: Paths that must exist, such as a directory that a package creates. If one is missing, nothing is changed.
    type: list
    elements: path
    default: []
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Create the user, its directory and its settings; look for the package
  django_celery.stack.host_state:
    users:
      - {name: mailroom, home: /var/lib/mailroom}
    directories:
      - {path: /etc/mailroom, owner: root, group: mailroom, mode: "0750"}
    files:
      - {path: /etc/mailroom/flower.environment, secret_content: "KEY=secret\n", owner: root, group: mailroom, mode: "0640"}
    packages:
      python3-venv: "3[.]"
"""

RETURN = r"""
packages:
  description: Versions of the packages that are installed.
  type: dict
  returned: always
  sample: {python3-venv: 3.13.5-1}
packages_missing:
  description: Names of packages that are not installed, or not in a matching version.
  type: list
  elements: str
  returned: always
  sample: []
exists:
  description: Whether each path of O(look_at) and O(requires) exists. For a link, whether its target exists.
  type: dict
  returned: always
  sample: {/opt/mailroom/current: true}
links:
  description: Targets of the paths that are symbolic links.
  type: dict
  returned: always
  sample: {/opt/mailroom/current: /opt/mailroom/releases/5e398af7a47e}
staged:
  description: Staged files whose text differs.
  type: list
  elements: str
  returned: always
  sample: []
applied:
  description: Whether all paths of O(requires) exist, so that users, directories and files were compared.
  type: bool
  returned: always
  sample: true
"""


def main() -> None:
    owner: dict[str, object] = {
        "path": {"type": "path", "required": True},
        "owner": {"type": "str", "required": True},
        "group": {"type": "str"},
        "mode": {"type": "str", "required": True},
    }
    content: dict[str, object] = {"content": {"type": "str"}, "secret_content": {"type": "str", "no_log": True}}
    staged: dict[str, object] = {"staged": {"type": "bool", "default": False}}
    module = UnloggedModule(
        argument_spec={
            "users": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "group": {"type": "str"},
                    "home": {"type": "path", "required": True},
                },
            },
            "directories": {"type": "list", "elements": "dict", "default": [], "options": owner},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {**owner, **content, **staged},
                "mutually_exclusive": [("content", "secret_content")],
                "required_one_of": [("content", "secret_content")],
            },
            "packages": {"type": "dict", "default": {}},
            "look_at": {"type": "list", "elements": "path", "default": []},
            "requires": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    state = HostState(module)
    try:
        state.run()
    except Failure as failure:
        module.fail_json(msg=str(failure), **state.result)
    module.exit_json(**state.result)


if __name__ == "__main__":
    main()
