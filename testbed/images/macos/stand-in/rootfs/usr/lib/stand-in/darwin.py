"""Lets the Python that imports it take its machine for a Mac, as far as Ansible's facts ask."""

import builtins
import io
import platform

platform.system = lambda: "Darwin"
platform.machine = lambda: "arm64"
platform.release = lambda: "24.5.0"
platform.mac_ver = lambda *_: ("15.5", ("", "", ""), "arm64")

# Which process is the first; a Mac has no /proc, there Ansible asks ps.
_open = builtins.open
builtins.open = lambda file, *words, **named: io.StringIO("launchd\n") if file == "/proc/1/comm" else _open(file, *words, **named)
