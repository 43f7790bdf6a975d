"""Converts entries of services_list to systemd units."""

from __future__ import annotations

import re

# Directives that remove privileges that a network service does not need: systemd.exec(5).
SANDBOX = [
    ("NoNewPrivileges", "yes"),
    ("CapabilityBoundingSet", ""),
    ("ProtectSystem", "strict"),
    ("ProtectHome", "yes"),
    ("ProtectProc", "invisible"),
    ("ProcSubset", "pid"),
    ("ProtectClock", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("PrivateDevices", "yes"),
    ("PrivateIPC", "yes"),
    ("PrivateTmp", "yes"),
    ("PrivateUsers", "yes"),
    ("RemoveIPC", "yes"),
    ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("KeyringMode", "private"),
    ("SystemCallArchitectures", "native"),
    ("SystemCallFilter", "@system-service"),
    ("SystemCallFilter", "~@privileged @resources @keyring process_vm_readv process_vm_writev"),
    # gunicorn calls chown on files that it creates, even when the owner does not change.
    ("SystemCallFilter", "@chown"),
    ("SystemCallErrorNumber", "EPERM"),
]


def quote(value):
    """Return a value as one word of a unit file: systemd.syntax(7). Specifiers (%) are escaped."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    if text and re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", text):
        return text
    return f'"{text}"'


def command_line(words):
    """Return a command line of a unit file: systemd.service(5). Variables ($) are escaped too."""
    return " ".join(quote(word).replace("$", "$$") for word in words)


def _lines(directives):
    """Return one line per pair of name and value. Pairs whose value is None are omitted."""
    return [f"{name}={value}" for name, value in directives if value is not None]


def _file(sections):
    """Return the text of a unit file, from a mapping of sections to their lines."""
    return "\n".join("\n".join([f"[{name}]", *lines]) + "\n" for name, lines in sections.items())


def _writable(service, state):
    """Return the directives that let a service write to directories, but not run programs that an attacker stores there."""
    # A parent directory such as /var/lib is not listed: systemd would make it writable, although ProtectSystem=strict protects it.
    without_programs = ["/tmp", "/var/tmp", "-/dev/shm", *state, *service["writable"]]  # noqa: S108 - not a file's name
    return [("ReadWritePaths", " ".join(service["writable"]) or None), ("NoExecPaths", " ".join(without_programs))]


def _network(service):
    """Return the directives that limit a unit's connections to the loopback addresses and `allowed_addresses`."""
    addresses = service["allowed_addresses"]
    return [("IPAddressDeny", "any"), ("IPAddressAllow", " ".join(["localhost", *addresses]))] if addresses else []


def _target(app):
    return _file({"Unit": [f"Description=All services of {app}"], "Install": ["WantedBy=multi-user.target"]})


def _socket(service, app):
    unit = [("Description", f"Socket of {service['description']}"), ("PartOf", f"{app}.target")]
    listeners = [
        *(("ListenStream", address) for address in service["listen"]),
        # A socket on [::] accepts no IPv4 connections, regardless of the kernel's default.
        ("BindIPv6Only", "ipv6-only"),
        ("Backlog", 2048),
        *_network(service),
    ]
    return _file({"Unit": _lines(unit), "Socket": _lines(listeners), "Install": [f"WantedBy={app}.target"]})


def _timer(service, app):
    unit = [("Description", f"Schedule of {service['description']}"), ("PartOf", f"{app}.target" if app else None)]
    # If the host was down at the scheduled time, the command runs after the next boot.
    events = [("OnCalendar", service["schedule"]), ("Persistent", "yes")]
    return _file({"Unit": _lines(unit), "Timer": _lines(events), "Install": [f"WantedBy={app or 'timers'}.target"]})


def _service(service, app, user, after, standby=False):
    """Return the unit of a service, or of its second instance, which uses the service's socket."""
    socket = f"{service['name']}.socket" if "listen" in service else None
    state_directory = service.get("state_directory")
    # A timer starts the service. If the service fails, systemd waits for the timer's next scheduled time.
    scheduled = "schedule" in service
    unit = [
        ("Description", f"{service['description']}, during a restart" if standby else service["description"]),
        ("PartOf", f"{app}.target" if app else None),
        # After= sets only the order. It does not require these units, since they can run on other hosts.
        ("After", " ".join(["network-online.target", *after])),
        ("Wants", "network-online.target"),
        ("Requires", socket),
        ("After", socket),
        # The number of restarts has no limit: the broker can be unavailable for hours, and systemd must keep restarting the
        # service.
        ("StartLimitIntervalSec", 0),
    ]
    process = [
        ("Type", "oneshot" if scheduled else service["type"]),
        ("User", user),
        ("Group", user),
        ("Sockets", socket if standby else None),
        ("WorkingDirectory", service["directory"]),
        *(("EnvironmentFile", path) for path in service["environment_files"]),
        *(("Environment", quote(f"{name}={value}")) for name, value in service["environment"].items()),
        ("ExecStart", command_line(service["command"])),
        ("Restart", "no" if standby or scheduled else "always"),
        ("RestartSec", 2),
        # Only the main process gets TERM, so its children finish their work. At the timeout, systemd kills all remaining processes.
        ("KillMode", "mixed"),
        ("TimeoutStartSec", service.get("run_timeout")),
        ("TimeoutStopSec", service["stop_timeout"]),
        ("WatchdogSec", service.get("watchdog")),
        # If the kernel kills a child that uses too much memory, the service continues and replaces the child.
        ("OOMPolicy", "continue"),
        ("MemoryMax", service["memory_max"]),
        ("TasksMax", service["tasks_max"]),
        ("CPUWeight", service["cpu_weight"]),
        ("LimitNOFILE", service["open_files"]),
        ("UMask", "0027"),
        ("StateDirectory", state_directory),
        ("StateDirectoryMode", "0750" if state_directory else None),
    ]
    writable = _writable(service, [f"/var/lib/{state_directory}"] if state_directory else [])
    lines = [*_lines(process), "", *_lines([*SANDBOX, *writable, *_network(service)]), *service["directives"]]
    install = {} if standby or scheduled else {"Install": [f"WantedBy={app}.target"]}
    return _file({"Unit": _lines(unit), "Service": lines, **install})


def _packaged_unit(service):
    """Return the drop-in of a unit that a package installs."""
    if "listen" in service:
        # The limit of a service does not apply to the sockets that it gets from systemd.
        listeners = _lines([*(("ListenStream", address) for address in service["listen"]), *_network(service)])
        content = _file({"Socket": ["# The empty value removes the package's addresses.", "ListenStream=", *listeners]})
        return {"name": f"{service['name']}.socket", "content": content, "packaged": True}
    hardening = [*SANDBOX, *_writable(service, [])] if service["sandbox"] else []
    content = _file({"Service": [*_lines([*hardening, *_network(service)]), *service["directives"]]})
    files = {name: service[name] for name in ("restart_on", "reload_on")}
    return {"name": f"{service['name']}.service", "content": content, "packaged": True, **files}


def systemd_units(services, app, user, after):
    """Return the units of services for the module systemd_units.

    `services` is services_list with all defaults. `app` is empty if all services are packaged or have a schedule. `user` is the
    user and the group of the services. `after` lists units that start before them.
    """
    units = [{"name": f"{app}.target", "content": _target(app), "shared": True}] if app else []
    for service in services:
        if service["packaged"]:
            units.append(_packaged_unit(service))
            continue
        if "listen" in service:
            units.append({"name": f"{service['name']}.socket", "content": _socket(service, app)})
        content = _service(service, app, user, after)
        if "schedule" in service:
            units.append({"name": f"{service['name']}.service", "content": content, "on_demand": True})
            units.append({"name": f"{service['name']}.timer", "content": _timer(service, app)})
            continue
        units.append({"name": f"{service['name']}.service", "content": content, "restart_on": service["restart_on"], "settle": 3})
        if service["handover"]:
            standby = _service(service, app, user, after, standby=True)
            units.append(
                {"name": f"{service['name']}-standby.service", "content": standby, "standby_of": f"{service['name']}.service"}
            )
    return units


class FilterModule:
    def filters(self):
        return {"systemd_units": systemd_units}
