"""Searches a host for secrets. Reads their names and values as JSON from standard input, and prints the hits as JSON.

A hit has a place, the name of the secret, and for a file its mode and owner. Root runs this program, so it sees everything.
The test decides which hits are permitted.
"""

from __future__ import annotations

import base64
import json
import os
import pwd
import re
import subprocess
import sys
from urllib.parse import quote

# The kernel's own file systems. Processes are searched separately.
SKIPPED = {"proc", "sys", "dev"}


def files_with(forms):
    """Returns the files that contain one of the strings. grep searches the whole host within seconds."""
    places = [f"/{name}" for name in os.listdir("/") if name not in SKIPPED]
    command = ["grep", "-rlaFZ", "--devices=skip", "--file=-", *places]
    found = subprocess.run(command, input=b"\n".join(forms), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return [os.fsdecode(path) for path in found.stdout.split(b"\0") if path]


def forms(value):
    """Returns the value as it is, and as it is encoded in a URL, in JSON and in base64."""
    plain = {value, quote(value, safe=""), json.dumps(value)[1:-1]}
    encoded = {base64.b64encode(b"x" * shift + value.encode())[4 if shift else 0 : -4] for shift in range(3)}
    return {each.encode() for each in plain} | {each for each in encoded if len(each) > 12}


def main():
    secrets = json.load(sys.stdin)
    # Outside of a rotation, the old values are empty.
    names = {form: name for name, value in secrets.items() if value for form in forms(value)}
    pattern = re.compile(b"|".join(re.escape(form) for form in sorted(names, key=len, reverse=True)))
    hits = set()

    def look(place, data, mode="", owner=""):
        for found in pattern.findall(data):
            hits.add((place, names[found], mode, owner))

    for path in files_with(names):
        try:
            status = os.lstat(path)
            with open(path, "rb") as file:
                look(path, file.read(), f"{status.st_mode & 0o7777:04o}", pwd.getpwuid(status.st_uid).pw_name)
        except (OSError, KeyError):
            continue
    own = {str(os.getpid()), str(os.getppid())}
    for pid in (name for name in os.listdir("/proc") if name.isdigit() and name not in own):
        for file in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{file}", "rb") as stream:
                    data = stream.read()
                with open(f"/proc/{pid}/comm") as stream:
                    program = stream.read().strip()
                owner = pwd.getpwuid(os.stat(f"/proc/{pid}").st_uid).pw_name
            except (OSError, KeyError):
                continue
            look(f"{file} of {program}", data, owner=owner)
    look("journal", subprocess.run(["journalctl", "--no-pager", "--all", "--output=export"], stdout=subprocess.PIPE).stdout)
    look("units", subprocess.run(["systemctl", "show", "*"], stdout=subprocess.PIPE).stdout)
    look("kernel log", subprocess.run(["dmesg"], stdout=subprocess.PIPE).stdout)
    json.dump(sorted(hits), sys.stdout)


main()
