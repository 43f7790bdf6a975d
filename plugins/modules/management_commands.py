#!/usr/bin/python
"""Run management commands and imports of a Django project in one process."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_commands import ACTIONS, run
from ansible_collections.django_celery.stack.plugins.module_utils.unlogged import UnloggedModule

DOCUMENTATION = r"""
module: management_commands
short_description: Run management commands and imports of a Django project in one process
version_added: 0.1.0
description:
  - Does steps in one Python process, so that Django and the project are imported only once. A step is a management command, the
    import of an application, or a check.
  - Stops at the first step that fails, and shows its output.
  - Runs nothing in check mode.
options:
  directory:
    description: The release, with a virtual environment C(venv).
    type: path
    required: true
  environment_file:
    description: A file that C(sh) can read. Its variables are the environment of the steps.
    type: path
    required: true
  environment:
    description: Variables that override those of the file.
    type: dict
    default: {}
  manage:
    description: The program for management commands. A script in the release ends with C(.py). Python runs another name with C(-m).
    type: str
    default: manage.py
  steps:
    description: The steps, in order. Each has exactly one of O(steps[].command), O(steps[].static), O(steps[].wsgi),
      O(steps[].asgi), O(steps[].celery), O(steps[].databases), O(steps[].migrations) and O(steps[].health).
    type: list
    elements: dict
    required: true
    suboptions:
      command:
        description: A management command with its arguments, such as V(migrate --noinput).
        type: str
      static:
        description: >-
          With V(collect), the management command C(collectstatic). If the project has no static files, RV(steps[].note) is the
          reason.
        type: str
        choices: [collect]
      wsgi:
        description: A WSGI application to import, such as V(mailroom.wsgi:application). An ASGI application is an error.
        type: str
      asgi:
        description: An ASGI application to import, such as V(mailroom.asgi:application). A WSGI application is an error.
        type: str
      celery:
        description: A Celery application to import with its tasks, by its name in the option C(--app).
        type: str
      databases:
        description: With V(outside), a database that is a file in the release is an error.
        type: str
        choices: [outside]
      migrations:
        description: With V(known), a migration that the database has and the release does not contain is an error.
        type: str
        choices: [known]
      health:
        description: >-
          A request for the project, as JSON, such as V({"path": "/healthz", "host": "localhost", "statuses": [200]}). A response
          with another status is an error. An empty list of statuses accepts each status below 500. No server runs for this request.
        type: str
      stdin:
        description: The command's standard input. Pass secrets here, not in the arguments.
        type: str
      unchanged:
        description: >-
          A regular expression that matches the output if the command changed nothing. Without it, each run of a command is reported
          as a change. Other steps are never reported as a change.
        type: str
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: Check the project and migrate its database
  django_celery.stack.management_commands:
    directory: /opt/mailroom/current
    environment_file: /opt/mailroom/current/environment
    steps:
      - {command: check --deploy, unchanged: ""}
      - {wsgi: "mailroom.wsgi:application"}
      - {command: migrate --noinput, unchanged: No migrations to apply}
"""

RETURN = r"""
steps:
  description: The action and output of each step, and whether it changed something.
  type: list
  elements: dict
  returned: success
  sample: [{"command": "migrate --noinput", "changed": false, "stdout": "No migrations to apply.", "stderr": "", "note": ""}]
"""


def main() -> None:
    actions = list(ACTIONS)
    step: dict[str, object] = {
        "command": {"type": "str"},
        "static": {"type": "str", "choices": ["collect"]},
        "wsgi": {"type": "str"},
        "asgi": {"type": "str"},
        "celery": {"type": "str"},
        "databases": {"type": "str", "choices": ["outside"]},
        "migrations": {"type": "str", "choices": ["known"]},
        "health": {"type": "str"},
        "stdin": {"type": "str", "no_log": True},
        "unchanged": {"type": "str"},
    }
    module = UnloggedModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "environment_file": {"type": "path", "required": True},
            "environment": {"type": "dict", "default": {}},
            "manage": {"type": "str", "default": "manage.py"},
            "steps": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": step,
                "mutually_exclusive": [actions],
                "required_one_of": [actions],
            },
        },
        supports_check_mode=True,
    )
    options = module.params
    if module.check_mode:
        module.exit_json(changed=False, steps=[])
    try:
        environment = {name: str(value) for name, value in options["environment"].items()}
        steps = run(options["environment_file"], options["directory"], options["manage"], environment, options["steps"])
    except Failure as failure:
        module.fail_json(msg=str(failure))
    module.exit_json(changed=any(each["changed"] for each in steps), steps=steps)


if __name__ == "__main__":
    main()
