"""What is odd about the machine that the hosts run on, all of it in this one file.

How Podman has to be called here, the limits it may hand out, and what the machine's own
configuration says about package mirrors and certificates. Everything is read from the machine;
nothing about a particular one is written down.
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

# systemd inside a host only applies a unit's sandbox if it may mount and create namespaces.
# Without these it skips most of ProtectSystem=, PrivateUsers= and the like without failing, and a
# hardening test would pass for the wrong reason.
CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE")

# A unit's LoadCredential= and private mounts propagate from a shared root mount only.
INIT = ("/bin/sh", "-c", "mount --make-rshared / && exec /sbin/init")

PODMAN_TIMEOUT = 180  # seconds; no single call but a build takes nearly that long


class TestbedError(Exception):
    """Something the person at the terminal can act on; printed without a traceback."""

    __test__ = False  # not a test class, whatever its name suggests to pytest


# State: keys, locks and the mount namespace, shared by all clones on the machine.


def state_directory() -> Path:
    """Return the directory of this user's state, created with mode 0700."""
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
    """Hold the machine-wide lock `name`; print `waiting` once if another process has it."""
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
    """Return {mount point: (file system type, optional fields)} as process `pid` sees them."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        found[fields[4]] = (after.split(" ")[0], " ".join(fields[6:]))
    return found


@functools.cache
def needs_namespace() -> bool:
    """Tell whether /sys/fs/cgroup is something else than one pure cgroup2 tree.

    crun and systemd refuse the hybrid layout; a private view of the machine with pure cgroup2
    satisfies both without changing the machine.
    """
    return sys.platform == "linux" and _mounts().get("/sys/fs/cgroup", ("",))[0] != "cgroup2"


def _is_pinned(path: Path) -> bool:
    """Tell whether `path` is a bind-mounted namespace rather than the plain file under it."""
    return path.exists() and path.stat().st_dev == os.stat("/proc/self/ns/mnt").st_dev


def _guards() -> Iterator[tuple[Path, list[bytes]]]:
    """Give (/proc/PID, command line) of the processes that guard Podman's running containers."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process may end while we look
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"conmon"):
                yield process, words


def _namespace_of_running_hosts() -> str | None:
    """Return /proc/PID/ns/mnt of a process that guards one of our running containers, if any.

    Podman's mounts live in that namespace, so hosts that outlived its file stay usable.
    """
    for process, words in _guards():
        with contextlib.suppress(OSError):
            kind = _mounts(process.name).get("/sys/fs/cgroup", ("",))[0]
            if kind == "cgroup2" and any(word.startswith(b"tb-") for word in words):
                return f"{process}/ns/mnt"
    return None


@functools.cache
def _namespace() -> Path:
    """Return the file of the machine-wide mount namespace, making it when missing or stale.

    It has to be the same one for every Podman call of every clone: Podman's overlay mounts live
    in it. Raises TestbedError without root, which alone may mount.
    """
    if os.geteuid() != 0:
        raise TestbedError(
            "this machine's /sys/fs/cgroup is not pure cgroup2 and only root can work around that: "
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
        # A namespace can only be pinned on a mount that is not propagated into it.
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
    """Pin a namespace with pure cgroup2 to the file `path`.

    Linux only pins one that it deems younger than the caller's, going by numbers which each
    processor hands out from a range of its own. So one of the processors will do.
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
    """Return the words that every Podman command line starts with on this machine."""
    needed = ["podman"]
    if needs_namespace():
        needed += ["nsenter", "unshare", "runc"]
    missing = [name for name in needed if not shutil.which(name)]
    if missing:
        raise TestbedError(f"{', '.join(missing)} not found: run testbed/install first")
    if not needs_namespace():
        return ("podman",)
    # runc, because crun wants CAP_SYS_RESOURCE; cgroupfs, because no systemd answers in there.
    return (
        "nsenter", f"--mount={_namespace()}",
        "podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs",
    )  # fmt: skip


def podman(
    *words: str, stdin: str | None = None, check: bool = True, timeout: float = PODMAN_TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run one Podman command and return it with its output captured.

    `timeout` is in seconds. Raises TestbedError when it fails (unless not `check`) or hangs.
    Paths in `words` have to be absolute: the command does not run in this directory.
    """
    command = [*podman_command(), *words]
    done = _run(command, stdin=stdin, check=False, timeout=timeout)
    if done.returncode and _forget_previous_boot(done.stderr):
        done = _run(command, stdin=stdin, check=False, timeout=timeout)
    if check and done.returncode:
        raise TestbedError(f"podman {words[0]} failed: {_last_words(done)}")
    return done


def start(name: str) -> None:
    """Start a container that has stopped; raises TestbedError when it cannot be started."""
    done = podman("start", name, check=False)
    left_over = re.search(r'container "(\w+)": runc: .*ID already exists', done.stderr)
    if left_over:
        # runc's notes too outlive a boot where /run is no tmpfs.
        _run(["runc", "delete", "--force", left_over[1]], check=False)
        done = podman("start", name, check=False)
    if done.returncode:
        raise TestbedError(f"podman start failed: {_last_words(done)}")


def _forget_previous_boot(complaint: str) -> bool:
    """Let Podman see that the machine was restarted, if `complaint` says that it did not notice.

    Podman takes a file under /run as the sign that nothing was restarted. Where /run is no tmpfs
    the file outlives a boot, and Podman looks for network namespaces and locks that are gone.
    Tells whether the command is worth another try.
    """
    if not any(sign in complaint for sign in ("unknown FS magic", "libpod_lock", "netns")):
        return False
    if any(_guards()):
        return False  # some container is alive, so it is no restart
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    sign = Path("/run/libpod/alive" if os.geteuid() == 0 else f"{runtime}/libpod/tmp/alive")
    if not sign.exists():
        return False
    sign.unlink()
    return True


def _run(command: list[str], stdin: str | None = None, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `command`; raise TestbedError when it fails (unless not `check`) or takes too long."""
    feed = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=timeout, **feed)
    except subprocess.TimeoutExpired:
        raise TestbedError(f"no answer within {timeout:.0f} s: {' '.join(command)}") from None
    if check and done.returncode:
        raise TestbedError(f"{command[0]} failed: {_last_words(done)}")
    return done


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that `done` printed, errors first, without Podman's warnings."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip() and "level=warning" not in line]
    return lines[-1] if lines else f"exit status {done.returncode}"


def limits() -> list[str]:
    """Return the options that keep a container within what this process may hand out."""

    def hard(number: int) -> float:
        value = resource.getrlimit(number)[1]
        return float("inf") if value == resource.RLIM_INFINITY else value

    files = hard(resource.RLIMIT_NOFILE)
    # Podman 4 lowers its own limit of processes to that of files where it may not raise it.
    processes = min(files, hard(resource.RLIMIT_NPROC))
    options = ["--pids-limit=-1"]  # a bare cgroup2 tree has no controller to set one with
    if sys.platform != "linux":
        return options  # Podman's own virtual machine decides; its limits are not ours
    for name, value in (("nofile", files), ("nproc", processes)):
        text = "-1" if value == float("inf") else str(value)
        options += ["--ulimit", f"{name}={text}:{text}"]
    return options


def host_options() -> list[str]:
    """Return the `podman run` options with which systemd is at home in a container."""
    options = ["--systemd=always", "--security-opt", "unmask=ALL", *limits()]
    for capability in CAPABILITIES:
        options += ["--cap-add", capability]
    return options


def build_options() -> list[str]:
    """Return the `podman build` options: in the hybrid layout RUN steps get no container."""
    return ["--isolation=chroot", "--network=host"] if needs_namespace() else []


# The machine's surroundings.


def extra_ca_certificates() -> list[Path]:
    """Return the certificate files that were added to this machine's trust by hand.

    The network path of such a machine ends TLS, so hosts on it must trust them too.
    TESTBED_CA_CERTIFICATES (colon-separated paths) replaces what is found.
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
    """Return {"debian": URL, "security": URL} as far as this machine's apt knows them.

    Empty where apt is missing or takes its packages from another distribution.
    TESTBED_DEBIAN_MIRROR (the URL that ends in /debian) replaces what is found.
    """
    chosen = os.environ.get("TESTBED_DEBIAN_MIRROR")
    if chosen:
        return {"debian": chosen}
    # Read from its files: asking apt takes longer than all else that an idle `up` does.
    etc = Path("/etc/apt")
    texts = [
        path.read_text(errors="replace")
        for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
        if path.suffix in (".list", ".sources") and path.is_file()
    ]
    return mirrors_in("\n".join(texts))


def mirrors_in(sources: str) -> dict[str, str]:
    """Pick Debian's mirrors out of the text of apt's source files; the first of a kind wins."""
    found: dict[str, str] = {}
    for line in sources.splitlines():
        if not line.lstrip().startswith("#"):
            for match in re.finditer(r"(https?://\S+/debian(-security)?)/?(?=\s|$)", line):
                found.setdefault("security" if match[2] else "debian", match[1])
    return found


@functools.cache
def apt_settings() -> str:
    """Return the apt.conf text by which hosts reach the mirrors in the way the machine does."""
    if not shutil.which("apt-config"):
        return ""
    dump = _run(["apt-config", "dump"]).stdout
    return "".join(
        f"{line}\n" for line in dump.splitlines() if re.match(r'Acquire::(https?::(Proxy|.*::Proxy)|Check-Valid-Until) "[^"]', line)
    )


def ca_bundle() -> str:
    """Return all certificates the machine trusts as one PEM text ("" where there is no bundle)."""
    for name in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"):
        if Path(name).exists():
            return Path(name).read_text()
    return ""


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Give a directory that Podman sees too, and remove it afterwards."""
    parent = state_directory() / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
