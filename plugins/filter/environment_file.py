"""Writes environment files that both systemd and sh can read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment_file(variables):
    """Return the text of an environment file, one line per variable.

    Values are in single quotes, which systemd's EnvironmentFile= and sh read in the same way. True and false are written in
    lower case, lists with commas.
    """
    lines = []
    for name, value in sorted(variables.items()):
        if not NAME.fullmatch(str(name)):
            raise AnsibleFilterError(f"'{name}' is not a valid name of an environment variable.")
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value)
        elif value is None:
            value = ""
        text = str(value)
        if "\n" in text or "\0" in text:
            raise AnsibleFilterError(f"The value of the environment variable {name} contains a line break or a NUL byte.")
        lines.append("{}='{}'\n".format(name, text.replace("'", "'\\''")))
    return "".join(lines)


def environment_errors(variables):
    """Return an error for each variable that an environment file can't contain. No error shows a value."""
    errors = []
    for name, value in sorted(variables.items()):
        items = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(item, (Mapping, list, tuple)) for item in items):
            errors.append(f"{name} is a mapping or a nested list. For JSON, use to_json.")
            continue
        try:
            environment_file({name: value})
        except AnsibleFilterError as error:
            errors.append(str(error))
    return errors


def private_environment_files(environments, path, mode):
    """Return the files for environments by key, in the format of the module host_state. The key is the suffix of the file's name.

    An environment without variables has no file, because the host does not run its services.
    """
    return [
        {"path": f"{path}.{key}", "secret_content": environment_file(variables), "staged": True, "mode": mode}
        for key, variables in sorted(environments.items())
        if variables
    ]


class FilterModule:
    def filters(self):
        return {
            "environment_errors": environment_errors,
            "environment_file": environment_file,
            "private_environment_files": private_environment_files,
        }
