"""Inspects a host before anything is installed on it, and describes each problem with its remedy. Changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import smtplib
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

TIMEOUT = 10
LISTEN = "0A"
APT_HELPER = "/usr/lib/apt/apt-helper"
APT_TARGETS = ["apt-get", "indextargets", "--format", "$(REPO_URI)dists/$(RELEASE)/InRelease"]


# Disk, memory and clock


def disk_problems(wanted: dict[str, float]) -> Iterator[str]:
    for path, gigabytes in wanted.items():
        # The directory may not exist yet.
        existing = next(each for each in (Path(path), *Path(path).parents) if each.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if free < gigabytes:
            yield f"{path} has {free:.1f} GB of free space; {gigabytes:g} GB are needed. Free space, or enlarge the disk."


def memory_problems(megabytes: int, meminfo: str = "/proc/meminfo") -> Iterator[str]:
    found = re.search(r"^MemTotal:\s+(\d+) kB", Path(meminfo).read_text(), re.MULTILINE)
    total = int(found[1]) // 1024 if found else 0
    if total < megabytes:
        yield f"The host has {total} MB of memory; {megabytes} MB are needed. Use a larger host."


def clock_problems(controller: float, seconds: float) -> Iterator[str]:
    difference = time.time() - controller
    if abs(difference) > seconds:
        yield (
            f"The clock differs from the controller's by {difference:.1f} s; allowed: {seconds:g} s. Synchronize both with NTP, "
            "for example with systemd-timesyncd or chrony."
        )


# Network


def name_problems(names: list[str]) -> Iterator[str]:
    for name in names:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            yield f"{name} does not resolve ({error.strerror}). Set service_address of that host to an address."


def url_problems(urls: list[str]) -> Iterator[str]:
    """Yield a problem for each URL without a response. Any status is a response.

    Certificates are not verified, since a run installs the certificate authorities of the environment.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for url in urls:
        # A repository can be a directory of the host.
        if url.startswith("file://") and os.path.isdir(url[len("file://") :]):
            continue
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT, context=context):  # noqa: S310 - an inventory sets the URL
                pass
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError) as error:
            yield f"{url} does not answer ({error}). Allow the connection, or set the variable for a mirror."


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})


def package_source_problems() -> Iterator[str]:
    """Query the package sources as the package manager does, for example through its proxy, but without changing its cache."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("apt-get"):
            for url in sorted(set(run(*APT_TARGETS).stdout.split())):
                done = run(APT_HELPER, "download-file", url, f"{folder}/InRelease")
                if done.returncode:
                    yield f"apt can't read {url} ({last_line(done)}). Correct /etc/apt/sources.list.d, or allow the connection."
        elif shutil.which("dnf"):
            # dnf stores the keys of metadata that it accepts in its cache. The cache is temporary, so the host does not change.
            done = run("dnf", "--quiet", "--assumeyes", f"--setopt=cachedir={folder}", "makecache")
            if done.returncode:
                yield f"dnf can't read its repositories ({last_line(done)}). Correct /etc/yum.repos.d, or allow the connection."


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1].strip() if lines else f"code {done.returncode}"


def mail_problems(server: Optional[dict[str, Any]]) -> Iterator[str]:
    """Send EHLO to the mail server. Sends no login and no email."""
    if not server:
        return
    host, port = server["host"], server["port"]
    try:
        if server["tls"]:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            client: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=TIMEOUT, context=context)
        else:
            client = smtplib.SMTP(host, port, timeout=TIMEOUT)
        with client:
            code, _ = client.ehlo()
        reason = "" if code == 250 else f"EHLO returns {code}"
    except (OSError, smtplib.SMTPException) as error:
        reason = str(error)
    if reason:
        yield f"The mail server {host}:{port} does not answer ({reason}). Correct app_email_url, or allow the connection."


# Ports


def listening_sockets(port: int, folder: str = "/proc/net") -> set[str]:
    """Return the inodes of the sockets that listen on a TCP port."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        file = Path(folder, name)
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def processes_with(inodes: set[str], folder: str = "/proc") -> Iterator[int]:
    """Yield the processes that have one of the sockets open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path(folder).iterdir():
        if process.name.isdigit():
            try:
                if any(os.readlink(link) in wanted for link in (process / "fd").iterdir()):
                    yield int(process.name)
            except OSError:
                # The process has ended.
                continue


def unit_of(process: int, folder: str = "/proc") -> str:
    """Return the systemd unit of a process, or its command if it runs in no unit."""
    try:
        text = Path(folder, str(process), "cgroup").read_text()
        found = re.search(r"/([^/\n]+\.service)(/|$)", text, re.MULTILINE)
        return found[1] if found else Path(folder, str(process), "comm").read_text().strip()
    except OSError:
        return "an unknown process"


def socket_units(port: int) -> list[str]:
    """Return the socket units of systemd that listen on a port."""
    lines = run("systemctl", "list-sockets", "--no-legend", "--full").stdout.splitlines()
    return [line.split()[1] for line in lines if line.split()[0].endswith(f":{port}")]


def port_problems(ports: dict[str, str]) -> Iterator[str]:
    """Yield a problem for each port that a unit uses whose name does not match the port's pattern."""
    for port, pattern in ports.items():
        inodes = listening_sockets(int(port))
        # systemd keeps the sockets of socket units open.
        holders = {name for process in processes_with(inodes) if process != 1 for name in [unit_of(process)]}
        if inodes:
            holders.update(socket_units(int(port)))
        if strangers := sorted(name for name in holders if not re.fullmatch(pattern, name)):
            yield f"Port {port} is used by {', '.join(strangers)}. Stop it, or choose another port for one of them."


def problems(options: dict[str, Any]) -> list[str]:
    return [
        *disk_problems(options["disk"]),
        *clock_problems(options["controller_time"], options["clock"]),
        *name_problems(options["names"]),
        *port_problems(options["ports"]),
        *(package_source_problems() if options["package_sources"] else []),
        *url_problems(options["urls"]),
        *mail_problems(options["mail_server"]),
    ]
