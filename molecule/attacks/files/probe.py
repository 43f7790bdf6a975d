"""Runs inside a unit: tries what an attacker would try in a compromised service, and prints the results as JSON."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
ACTS = {}
# System calls by their numbers on x86-64 and on AArch64.
COLUMN = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
CALLS = {
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "lookup_dcookie": (212, 18),
    "io_uring_setup": (425, 425),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "mbind": (237, 235),
    "move_pages": (279, 239),
}


def act(name):
    def add(function):
        ACTS[name] = function
        return function

    return add


def call(name, *arguments):
    """Makes a system call. Any error except EPERM, EACCES and ENOSYS means that the kernel permits the call."""
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(CALLS[name][COLUMN]), *[ctypes.c_long(each) for each in arguments])
    error = ctypes.get_errno()
    if result >= 0 or error not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return
    raise OSError(error, os.strerror(error))


def add_call(name, *arguments):
    ACTS[f"call {name}"] = lambda: call(name, *arguments)


for plain in (
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "swapon",
    "mount",
    "umount2",
    "pivot_root",
    "acct",
    "quotactl",
):
    add_call(plain, 0, 0, 0, 0, 0)
for plain in ("open_tree", "fsopen", "settimeofday", "clock_settime", "bpf", "userfaultfd"):
    add_call(plain, 0, 0, 0)
# A pointer that is not valid, so that nothing changes if the call is permitted.
for plain in ("sethostname", "setdomainname"):
    add_call(plain, 1, 5)
add_call("acct", 1)
add_call("reboot", 0, 0, 0, 0)  # wrong magic numbers: never reboots
add_call("perf_event_open", 0, 0, -1, -1, 0)
add_call("add_key", 0, 0, 0, 0, -3)
add_call("keyctl", 0, -3, 0)
add_call("ptrace", 16, 1, 0, 0)
add_call("process_vm_readv", 1, 0, 0, 0, 0, 0)
add_call("process_vm_writev", 1, 0, 0, 0, 0, 0)
add_call("kcmp", 1, 1, 0, 0, 0)
add_call("syslog", 3, 0, 0)
add_call("fanotify_init", 0, 0)
add_call("open_by_handle_at", -1, 0, 0)
add_call("io_uring_setup", 1, 0)
add_call("personality", 0x0040000)
add_call("vhangup")


def write(path):
    def attempt():
        with open(path, "w"):
            pass
        os.unlink(path)

    ACTS[f"write {os.path.dirname(path)}/attack"] = attempt


for directory in (
    *("/", "/usr", "/usr/bin", "/usr/local/bin", "/usr/lib/python3/dist-packages", "/etc", "/etc/systemd/system", "/etc/cron.d"),
    *(
        "/etc/rabbitmq",
        "/etc/mailroom",
        "/etc/postgresql",
        "/etc/nginx",
        "/opt",
        "/opt/mailroom",
        "/opt/mailroom/releases",
        "/boot",
    ),
    *(
        "/root",
        "/home",
        "/srv",
        "/var",
        "/var/log",
        "/var/spool",
        "/var/cache",
        "/var/lib",
        "/var/lib/systemd",
        "/run/systemd/system",
    ),
    *("/lib/modules", "/mnt", "/media", "/proc/sys/kernel", "/sys/kernel", "/dev"),
):
    write(f"{directory}/attack")


def change(path):
    def attempt():
        # Opening the file shows whether the unit can write to it. The probe writes nothing, because the host shares this machine's
        # kernel.
        os.close(os.open(path, os.O_WRONLY))

    ACTS[f"change {path}"] = attempt


for path in (
    *("/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper"),
    *("/etc/passwd", "/etc/ld.so.cache", "/etc/hosts"),
):
    change(path)


def read(path):
    def attempt():
        with open(path, "rb") as file:
            file.read(1)

    ACTS[f"read {path}"] = attempt


for path in (
    *(
        "/etc/shadow",
        "/root/.ssh/authorized_keys",
        "/proc/1/environ",
        "/proc/1/maps",
        "/proc/kcore",
        "/proc/kallsyms",
        "/proc/kmsg",
    ),
    *("/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/net/tun", "/dev/fuse", "/dev/kvm", "/dev/console"),
    # The passwords of the services' broker users.
    *(f"/opt/mailroom/current/environment.{kind}" for kind in ("web", "worker", "beat")),
    *("/etc/ssh/ssh_host_ed25519_key", "/proc/meminfo", "/proc/cpuinfo", "/sys/kernel/debug/sched"),
):
    read(path)


@act("see other users' processes")
def see():
    own = os.getuid()
    for name in os.listdir("/proc"):
        if name.isdigit():
            status = os.stat(f"/proc/{name}")
            if status.st_uid != own:
                return
    raise OSError("no process of another user")


@act("read the environment of another process")
def read_environment():
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if file.read(1):
                        return
            except OSError:
                pass
    raise OSError("no process has a readable environment")


@act("signal another process")
def signal_other():
    os.kill(1, 0)


@act("setuid 0")
def setuid():
    os.setuid(0)


@act("file that is setuid")
def setuid_file():
    path = os.path.join(own_directory(), "attack-setuid")
    with open(path, "w"):
        pass
    try:
        os.chmod(path, 0o4755)
        if not os.stat(path).st_mode & 0o4000:
            raise OSError("not setuid")
    finally:
        os.unlink(path)


@act("device node")
def device():
    path = os.path.join(own_directory(), "attack-node")
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 1))
    os.unlink(path)


@act("chroot")
def chroot():
    os.chroot("/tmp")


for flag, what in (
    *((0x10000000, "user"), (0x00020000, "mount"), (0x40000000, "network"), (0x20000000, "process")),
    *((0x00400000, "name"), (0x08000000, "IPC"), (0x02000000, "control group")),
):

    def unshare(flag=flag):
        child = os.fork()
        if child == 0:
            os._exit(0 if LIBC.unshare(flag) == 0 else 1)
        if os.waitpid(child, 0)[1] != 0:
            raise OSError("refused")

    ACTS[f"new {what} namespace"] = unshare


def open_socket(family, kind, protocol=0):
    return lambda: socket.socket(family, kind, protocol).close()


ACTS["packet socket"] = open_socket(17, socket.SOCK_RAW)
ACTS["netlink socket"] = open_socket(16, socket.SOCK_RAW)
ACTS["raw socket"] = open_socket(socket.AF_INET, socket.SOCK_RAW, 1)
ACTS["vsock socket"] = open_socket(40, socket.SOCK_STREAM)
ACTS["Bluetooth socket"] = open_socket(31, socket.SOCK_RAW)
ACTS["kernel crypto socket"] = open_socket(38, socket.SOCK_SEQPACKET)


@act("writable and executable memory")
def executable_memory():
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


@act("memory made executable")
def make_executable():
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError("refused")


@act("real-time priority")
def realtime():
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@act("higher priority")
def priority():
    os.setpriority(os.PRIO_PROCESS, 0, -5)


@act("more open files than the limit")
def limits():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 1))


def run_from(directory):
    def attempt():
        path = os.path.join(directory() if callable(directory) else directory, "attack-program")
        with open(path, "w") as file:
            file.write("#!/bin/sh\nexit 0\n")
        os.chmod(path, 0o700)
        try:
            subprocess.run([path], check=True)
        finally:
            os.unlink(path)

    return attempt


def own_directory():
    given = os.environ.get("ATTACK_DIRECTORY") or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return given or "/tmp"


ACTS["program in /tmp"] = run_from("/tmp")
ACTS["program in /var/tmp"] = run_from("/var/tmp")
ACTS["program in /dev/shm"] = run_from("/dev/shm")
ACTS["program in the own directory"] = run_from(own_directory)


def attempt(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def write_own():
    path = os.path.join(own_directory(), "attack-file")
    with open(path, "w"):
        pass
    os.unlink(path)


def main():
    signal.alarm(60)
    found = {name: attempt(function) for name, function in ACTS.items() if name != "setuid 0"}
    found["write own directory"] = attempt(write_own)
    found["setuid 0"] = attempt(setuid)
    found["pid"] = os.getpid()
    json.dump(found, sys.stdout)


if __name__ != "names":
    main()
