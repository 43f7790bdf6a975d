"""Makes the Python that imports this module report a Mac to Ansible's facts."""

import builtins
import io
import platform

platform.system = lambda: "Darwin"
platform.machine = lambda: "arm64"
platform.release = lambda: "24.5.0"
platform.mac_ver = lambda *_: ("15.5", ("", "", ""), "arm64")

# The name of process 1. A Mac has no /proc, so Ansible calls ps there.
_open = builtins.open
builtins.open = lambda file, *words, **named: io.StringIO("launchd\n") if file == "/proc/1/comm" else _open(file, *words, **named)
