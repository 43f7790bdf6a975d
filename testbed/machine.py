"""Adapts the testbed to the machine that runs the hosts.

This module returns the Podman command line, the limits that Podman may set, and the machine's package mirrors and certificates. It
reads all values from the machine, and assumes no specific machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# systemd on a host needs these capabilities to mount and to create namespaces for a unit's sandbox. Without them, it silently skips
# most of ProtectSystem=, PrivateUsers= and similar directives, and tests of the sandbox would test nothing.
CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE")

# A unit's LoadCredential= and private mounts propagate only from a shared root mount.
INIT = ("/bin/sh", "-c", "mount --make-rshared / && exec /sbin/init")

PODMAN_TIMEOUT = 180  # seconds; only builds take longer


class TestbedError(Exception):
    """An error that the user can fix; printed without a traceback."""

    __test__ = False  # pytest would collect the class by its name


# All clones on the machine share this state: keys, locks and the mount namespace.


def state_directory() -> Path:
    """Return the directory of this user's state; create it with mode 0700."""
    if os.environ.get("TESTBED_STATE"):
        path = Path(os.environ["TESTBED_STATE"]).absolute()
    elif os.environ.get("XDG_STATE_HOME"):
        path = Path(os.environ["XDG_STATE_HOME"]) / "testbed"
    elif os.geteuid() == 0:
        path = Path("/var/lib/testbed")
    else:
        path = Path.home() / ".local/state/testbed"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def lock(name: str, waiting: str) -> Iterator[None]:
    """Hold the machine-wide lock `name`; print `waiting` if another process holds it."""
    directory = state_directory() / "locks"
    directory.mkdir(exist_ok=True)
    with open(directory / f"{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# Control groups and Podman.


def _mounts(pid: str = "self") -> dict[str, tuple[str, str]]:
    """Return {mount point: (file system type, optional fields)} of the process `pid`."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        found[fields[4]] = (after.split(" ")[0], " ".join(fields[6:]))
    return found


@functools.cache
def needs_namespace() -> bool:
    """Return whether /sys/fs/cgroup has a layout other than a single pure cgroup2 tree.

    crun and systemd reject the hybrid layout. A mount namespace with pure cgroup2 works with both, and does not change the machine.
    """
    return sys.platform == "linux" and _mounts().get("/sys/fs/cgroup", ("",))[0] != "cgroup2"


def _is_pinned(path: Path) -> bool:
    """Return whether `path` is a bind-mounted namespace, not a plain file."""
    return path.exists() and path.stat().st_dev == os.stat("/proc/self/ns/mnt").st_dev


def _guards() -> Iterator[tuple[Path, list[bytes]]]:
    """Yield (/proc/PID, command line) of the monitor processes of Podman's running containers."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process may have ended meanwhile
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"conmon"):
                yield process, words


def _namespace_of_running_hosts() -> str | None:
    """Return /proc/PID/ns/mnt of a monitor process, if a container of the testbed runs.

    The monitor's namespace has Podman's mounts. So the testbed can still use running hosts if the namespace's file has been lost.
    """
    for process, words in _guards():
        with contextlib.suppress(OSError):
            kind = _mounts(process.name).get("/sys/fs/cgroup", ("",))[0]
            if kind == "cgroup2" and any(word.startswith(b"tb-") for word in words):
                return f"{process}/ns/mnt"
    return None


@functools.cache
def _namespace() -> Path:
    """Return the file of the machine-wide mount namespace; create the namespace when it is missing or stale.

    All Podman calls of all clones must use the same namespace, because it has Podman's overlay mounts. Raise TestbedError without
    root permissions, which mounting needs.
    """
    if os.geteuid() != 0:
        raise TestbedError(
            "this machine's /sys/fs/cgroup is not pure cgroup2, and only root can work around that: "
            "run as root, or boot with systemd.unified_cgroup_hierarchy=1"
        )
    directory = state_directory() / "namespace"
    path = directory / "mnt"
    if _is_pinned(path):
        return path
    with lock("namespace", "waiting for another process to prepare the mount namespace"):
        if _is_pinned(path):
            return path
        directory.mkdir(exist_ok=True)
        # A namespace can't be pinned on a mount that propagates into the namespace.
        kind, optional = _mounts().get(str(directory), ("", ""))
        if not kind:
            _run(["mount", "--bind", str(directory), str(directory)])
        if not kind or "shared:" in optional:
            _run(["mount", "--make-private", str(directory)])
        path.touch()
        alive = _namespace_of_running_hosts()
        if alive and _run(["mount", "--bind", alive, str(path)], check=False).returncode == 0:
            return path
        _pin_new_namespace(path)
    return path


def _pin_new_namespace(path: Path) -> None:
    """Pin a new namespace with pure cgroup2 to the file `path`.

    Linux pins a namespace only if its sequence number is higher than that of the caller's namespace. Each processor assigns
    numbers from its own range, so the attempt succeeds on at least one processor.
    """
    command = ["unshare", f"--mount={path}", "--propagation", "private", "sh", "-ec"]
    command += ["umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup"]
    processors = os.sched_getaffinity(0)
    try:
        for processor in sorted(processors):
            os.sched_setaffinity(0, {processor})
            done = _run(command, check=False)
            if done.returncode == 0:
                return
    finally:
        os.sched_setaffinity(0, processors)
    raise TestbedError(f"unshare failed: {_last_words(done)}")


@functools.cache
def podman_command() -> tuple[str, ...]:
    """Return the beginning of every Podman command line on this machine."""
    needed = ["podman"]
    if needs_namespace():
        needed += ["nsenter", "unshare", "runc"]
    missing = [name for name in needed if not shutil.which(name)]
    if missing:
        raise TestbedError(f"{', '.join(missing)} not found: run testbed/install first")
    if not needs_namespace():
        return ("podman",)
    # Podman uses runc, because crun needs CAP_SYS_RESOURCE, and cgroupfs, because systemd can't be reached in the namespace.
    return (
        "nsenter", f"--mount={_namespace()}",
        "podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs",
    )  # fmt: skip


def podman(
    *words: str, stdin: str | None = None, check: bool = True, timeout: float = PODMAN_TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run a Podman command and capture its output.

    `timeout` is in seconds. Raise TestbedError when the command fails (if `check`) or times out. Paths in `words` have to be
    absolute, because the command runs in another directory.
    """
    command = [*podman_command(), *words]
    done = _run(command, stdin=stdin, check=False, timeout=timeout)
    if done.returncode and _forget_previous_boot(done.stderr):
        done = _run(command, stdin=stdin, check=False, timeout=timeout)
    if check and done.returncode:
        raise TestbedError(f"podman {words[0]} failed: {_last_words(done)}")
    return done


def start(name: str) -> None:
    """Start a stopped container; raise TestbedError when that fails."""
    done = podman("start", name, check=False)
    left_over = re.search(r'container "(\w+)": runc: .*ID already exists', done.stderr)
    if left_over:
        # runc's state also survives a boot when /run is not a tmpfs.
        _run(["runc", "delete", "--force", left_over[1]], check=False)
        done = podman("start", name, check=False)
    if done.returncode:
        raise TestbedError(f"podman start failed: {_last_words(done)}")


def _forget_previous_boot(complaint: str) -> bool:
    """Remove Podman's boot marker if `complaint` shows that Podman missed a reboot; return whether to retry the command.

    Podman concludes from a file under /run that the machine was not rebooted. When /run is not a tmpfs, the file survives a reboot,
    and Podman looks for network namespaces and locks that no longer exist.
    """
    if not any(sign in complaint for sign in ("unknown FS magic", "libpod_lock", "netns")):
        return False
    if any(_guards()):
        return False  # a container is running, so there was no reboot
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    sign = Path("/run/libpod/alive" if os.geteuid() == 0 else f"{runtime}/libpod/tmp/alive")
    if not sign.exists():
        return False
    sign.unlink()
    return True


def _run(command: list[str], stdin: str | None = None, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `command`; raise TestbedError when it fails (if `check`) or times out."""
    feed = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=timeout, **feed)
    except subprocess.TimeoutExpired:
        raise TestbedError(f"timed out after {timeout:.0f} s: {' '.join(command)}") from None
    if check and done.returncode:
        raise TestbedError(f"{command[0]} failed: {_last_words(done)}")
    return done


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that `done` printed, preferably an error, without Podman's warnings."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip() and "level=warning" not in line]
    return lines[-1] if lines else f"exit status {done.returncode}"


def limits() -> list[str]:
    """Return the options that keep a container's limits within the limits of this process."""

    def hard(number: int) -> float:
        value = resource.getrlimit(number)[1]
        return float("inf") if value == resource.RLIM_INFINITY else value

    files = hard(resource.RLIMIT_NOFILE)
    # Podman 4 lowers its process limit to its file limit if it may not raise the process limit.
    processes = min(files, hard(resource.RLIMIT_NPROC))
    options = ["--pids-limit=-1"]  # the namespace's cgroup2 tree has no pids controller
    if sys.platform != "linux":
        return options  # the limits of Podman's virtual machine apply
    for name, value in (("nofile", files), ("nproc", processes)):
        text = "-1" if value == float("inf") else str(value)
        options += ["--ulimit", f"{name}={text}:{text}"]
    return options


def host_options() -> list[str]:
    """Return the `podman run` options that systemd needs in a container."""
    options = ["--systemd=always", "--security-opt", "unmask=ALL", *limits()]
    for capability in CAPABILITIES:
        options += ["--cap-add", capability]
    return options


def build_options() -> list[str]:
    """Return the `podman build` options: in the hybrid layout, RUN steps run without a container."""
    return ["--isolation=chroot", "--network=host"] if needs_namespace() else []


# The machine's mirrors and certificates.


def extra_ca_certificates() -> list[Path]:
    """Return the certificate files that somebody added to this machine's trust store.

    On a machine with such files, a proxy terminates TLS, so the hosts must trust the files too. TESTBED_CA_CERTIFICATES
    (colon-separated paths) overrides them.
    """
    chosen = os.environ.get("TESTBED_CA_CERTIFICATES")
    if chosen is not None:
        return [Path(name).absolute() for name in chosen.split(":") if name]
    anchors = (Path("/usr/local/share/ca-certificates"), Path("/etc/pki/ca-trust/source/anchors"))
    return sorted(
        path
        for directory in anchors
        for path in directory.rglob("*")
        if path.is_file() and b"BEGIN CERTIFICATE" in path.read_bytes()
    )


@functools.cache
def debian_mirrors() -> dict[str, str]:
    """Return {"debian": URL, "security": URL} from this machine's apt configuration.

    The result is empty if apt is missing or has the sources of another distribution. TESTBED_DEBIAN_MIRROR (the URL that ends in
    /debian) overrides it.
    """
    chosen = os.environ.get("TESTBED_DEBIAN_MIRROR")
    if chosen:
        return {"debian": chosen}
    # The function reads apt's files, because running apt takes longer than the rest of an `up` that changes nothing.
    etc = Path("/etc/apt")
    texts = [
        path.read_text(errors="replace")
        for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
        if path.suffix in (".list", ".sources") and path.is_file()
    ]
    return mirrors_in("\n".join(texts))


def mirrors_in(sources: str) -> dict[str, str]:
    """Return Debian's mirrors in the text of apt's source files: the first of each kind."""
    found: dict[str, str] = {}
    for line in sources.splitlines():
        if not line.lstrip().startswith("#"):
            for match in re.finditer(r"(https?://\S+/debian(-security)?)/?(?=\s|$)", line):
                found.setdefault("security" if match[2] else "debian", match[1])
    return found


@functools.cache
def apt_settings() -> str:
    """Return the apt.conf text that gives hosts the machine's proxies and Check-Valid-Until."""
    if not shutil.which("apt-config"):
        return ""
    dump = _run(["apt-config", "dump"]).stdout
    return "".join(
        f"{line}\n" for line in dump.splitlines() if re.match(r'Acquire::(https?::(Proxy|.*::Proxy)|Check-Valid-Until) "[^"]', line)
    )


def ca_bundle() -> str:
    """Return all certificates that the machine trusts as one PEM text ("" without a bundle)."""
    for name in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"):
        if Path(name).exists():
            return Path(name).read_text()
    return ""


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a temporary directory that Podman can access."""
    parent = state_directory() / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
