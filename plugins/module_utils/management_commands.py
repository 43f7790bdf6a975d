"""Runs management commands and imports of a Django project in one process with the project's environment."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from typing import Any

from ansible_collections.django_celery.stack.plugins.module_utils import django_runner
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure

# sh reads the environment file. The runner's text is an argument, since the steps use standard input.
SHELL = 'set -eu; set -a; . "$1"; set +a; cd "$2"; exec venv/bin/python -c "$3"'

# A step in the module's option `steps`. One key is the step's action; the others are `stdin` and `unchanged`.
Step = dict[str, Any]
# The actions of a step, and the message if the action fails.
ACTIONS = {
    "command": "`{manage} {argument}` failed in {directory}:",
    "static": "The static files can't be collected in {directory}:",
    "wsgi": "The WSGI application {argument} does not work in {directory}:",
    "asgi": "The ASGI application {argument} does not work in {directory}:",
    "celery": "The Celery application {argument} does not work in {directory}:",
    "databases": "The project's databases are refused:",
    "health": "The release in {directory} is not healthy:",
    "migrations": "The release in {directory} does not fit the database:",
}


def run(
    environment_file: str, directory: str, manage: str, environment: dict[str, str], steps: Sequence[Step]
) -> list[dict[str, Any]]:
    """Do the steps in order. Return each step's name, whether it changed something, and its output.

    `manage` runs management commands: a script in the directory, or a module. `environment` has variables that override those of
    the file.
    Raises Failure with the output of the first step that fails.
    """
    if not steps:
        return []
    source = django_runner.__loader__.get_source(django_runner.__name__)  # type: ignore[union-attr]
    asked = []
    for step in steps:
        action = next(name for name in ACTIONS if step.get(name) is not None)
        asked.append({"action": action, "argument": str(step[action]), "stdin": step["stdin"]})
    done = subprocess.run(
        ["sh", "-c", SHELL, "sh", environment_file, directory, source],
        input=json.dumps({"manage": manage, "environment": environment, "steps": asked}),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        results = json.loads(done.stdout)
    except ValueError:
        raise Failure(f"The project in {directory} did not start: {done.stderr.strip() or done.stdout.strip()}") from None
    found = []
    for step, asked_step, result in zip(steps, asked, results):
        action, argument = asked_step["action"], asked_step["argument"]
        if result["code"]:
            output = (result["stderr"] or result["stdout"]).strip()
            raise Failure(f"{ACTIONS[action].format(argument=argument, directory=directory, manage=manage)}\n{output}")
        # Only commands change something.
        changed = action == "command" and (step["unchanged"] is None or not re.search(step["unchanged"], result["stdout"]))
        found.append({action: argument, "changed": changed, **{key: result[key] for key in ("stdout", "stderr", "note")}})
    return found
