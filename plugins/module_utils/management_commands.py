"""Runs management commands of a Django project in one process with the project's environment."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from ansible_collections.django_celery.stack.plugins.module_utils import django_runner
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure

# sh reads the environment file. The runner's text is an argument, since the commands use standard input.
SHELL = 'set -eu; set -a; . "$1"; set +a; cd "$2"; exec venv/bin/python -c "$3"'

# A command in the module's option `commands`.
Command = dict[str, Any]


def run(environment_file: str, directory: str, commands: Sequence[Command]) -> list[dict[str, Any]]:
    """Run the commands in order. Return each command's name, whether it changed something, and its output.

    Raises Failure with the output of the first command that fails.
    """
    if not commands:
        return []
    source = django_runner.__loader__.get_source(django_runner.__name__)  # type: ignore[union-attr]
    asked = [{"arguments": shlex.split(command["command"]), "stdin": command["stdin"]} for command in commands]
    done = subprocess.run(
        ["sh", "-c", SHELL, "sh", environment_file, directory, source],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        results = json.loads(done.stdout)
    except ValueError:
        raise Failure(f"The project in {directory} did not start: {done.stderr.strip() or done.stdout.strip()}") from None
    found = []
    for command, result in zip(commands, results):
        if result["code"]:
            output = (result["stderr"] or result["stdout"]).strip()
            raise Failure(f"`manage.py {command['command']}` failed in {directory}:\n{output}")
        changed = command["unchanged"] is None or not re.search(command["unchanged"], result["stdout"])
        found.append({"command": command["command"], "changed": changed, "stdout": result["stdout"], "stderr": result["stderr"]})
    return found
