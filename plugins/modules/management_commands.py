#!/usr/bin/python
"""Run management commands of a Django project in one process."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_commands import run
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule

DOCUMENTATION = r"""
module: management_commands
short_description: Run management commands of a Django project in one process
version_added: 0.1.0
description:
  - Runs C(manage.py) of a release once for each command, in one Python process. Django and the project are imported only once.
  - Stops at the first command that fails, and shows its output.
  - Runs nothing in check mode.
options:
  directory:
    description: The release, with C(manage.py) and a virtual environment C(venv).
    type: path
    required: true
  environment_file:
    description: A file that C(sh) can read. Its variables are the environment of the commands.
    type: path
    required: true
  commands:
    description: The commands, in order.
    type: list
    elements: dict
    required: true
    suboptions:
      command:
        description: The command with its arguments, such as V(migrate --noinput).
        type: str
        required: true
      stdin:
        description: The command's standard input. Pass secrets here, not in the arguments.
        type: str
      unchanged:
        description: >-
          A regular expression that matches the output if the command changed nothing. Without it, each run counts as a change.
        type: str
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Check the project and migrate its database
  django_celery.stack.management_commands:
    directory: /opt/mailroom/current
    environment_file: /etc/mailroom/environment
    commands:
      - {command: check --deploy, unchanged: ""}
      - {command: migrate --noinput, unchanged: No migrations to apply}
"""

RETURN = r"""
commands:
  description: The name and output of each command, and whether it changed something.
  type: list
  elements: dict
  returned: success
  sample: [{"command": "migrate --noinput", "changed": false, "stdout": "No migrations to apply.", "stderr": ""}]
"""


def main() -> None:
    command: dict[str, object] = {
        "command": {"type": "str", "required": True},
        "stdin": {"type": "str", "no_log": True},
        "unchanged": {"type": "str"},
    }
    module = UnloggedModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "environment_file": {"type": "path", "required": True},
            "commands": {"type": "list", "elements": "dict", "required": True, "options": command},
        },
        supports_check_mode=True,
    )
    options = module.params
    if module.check_mode:
        module.exit_json(changed=False, commands=[])
    try:
        commands = run(options["environment_file"], options["directory"], options["commands"])
    except Failure as failure:
        module.fail_json(msg=str(failure))
    module.exit_json(changed=any(each["changed"] for each in commands), commands=commands)


if __name__ == "__main__":
    main()
