"""Quoting for the files of a service: systemd's command lines, and environment files that systemd and sh read alike."""

from __future__ import annotations

import re

from ansible.errors import AnsibleFilterError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def systemd_quote(value):
    """A value of a unit file as one word, as systemd.syntax(7) asks; specifiers (%) are taken literally."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    if text and re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", text):
        return text
    return f'"{text}"'


def systemd_command(words):
    """A command line of a unit file, as systemd.service(5) asks; variables ($) are taken literally there too."""
    return " ".join(systemd_quote(word).replace("$", "$$") for word in words)


def environment_file(variables):
    """The lines of an environment file, of a mapping of names to values.

    Only single quotes are used, the form in which systemd's EnvironmentFile= and sh agree; true and false are written
    in lower case, lists with commas.
    """
    lines = []
    for name, value in sorted(variables.items()):
        if not NAME.fullmatch(str(name)):
            raise AnsibleFilterError(f"'{name}' is no name of an environment variable.")
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value)
        elif value is None:
            value = ""
        text = str(value)
        if "\n" in text or "\0" in text:
            raise AnsibleFilterError(f"The environment variable {name} has a line break in its value.")
        lines.append("{}='{}'\n".format(name, text.replace("'", "'\\''")))
    return "".join(lines)


class FilterModule:
    def filters(self):
        return {
            "systemd_quote": systemd_quote,
            "systemd_command": systemd_command,
            "environment_file": environment_file,
        }
