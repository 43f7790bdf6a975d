"""Property lists of launchd, from the role services' list of services."""

from __future__ import annotations

import plistlib

# A property list is readable by all users and launchd reads no environment file, so a shell reads it and then becomes the command.
# Arguments: the file for the process's number, the environment file or an empty word, the command.
START = 'set -e; echo $$ >"$0"; if [ -n "$1" ]; then set -a; . "$1"; set +a; fi; shift; exec "$@"'


def _job(name, user, command, directory, log_directory, *, environment=None, supervision, restart_on=()):
    """A job, as the module launchd_jobs takes it. `supervision` are the keys that say when launchd starts and ends it."""
    # Aqua is the session of a user at the screen, Background that of a user who has only logged in by SSH.
    session = {"UserName": user} if user else {"LimitLoadToSessionType": ["Aqua", "Background"]}
    content = {
        "Label": name,
        **session,
        "ProgramArguments": [str(word) for word in command],
        "WorkingDirectory": directory,
        **({"EnvironmentVariables": {key: str(value) for key, value in environment.items()}} if environment else {}),
        **supervision,
        "Umask": 0o027,
        "StandardOutPath": f"{log_directory}/{name}.log",
        "StandardErrorPath": f"{log_directory}/{name}.log",
    }
    return {
        "name": name,
        "content": plistlib.dumps(content, sort_keys=False).decode(),
        "pid_file": f"{log_directory}/{name}.pid",
        "restart_on": list(restart_on),
        "settle": 3,
    }


def _service_job(service, user, log_directory):
    pid_file = f"{log_directory}/{service['name']}.pid"
    open_files = {"NumberOfFiles": service["open_files"]}
    return _job(
        service["name"],
        user,
        ["/bin/sh", "-c", START, pid_file, service.get("environment_file", ""), *service["command"]],
        service["directory"],
        log_directory,
        environment=service["environment"],
        restart_on=service["restart_on"],
        supervision={
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 5,
            # TERM goes to the first process. When it has ended, or at the timeout, the rest of its group is killed.
            "ExitTimeOut": service["stop_timeout"],
            "AbandonProcessGroup": False,
            # With the default, Standard, macOS throttles the job in favour of apps.
            "ProcessType": "Interactive",
            "SoftResourceLimits": open_files,
            "HardResourceLimits": open_files,
        },
    )


def _log_job(owner, user, log_directory):
    """Rotates the logs every hour. It runs as the services' user, so it can access only that user's files."""
    return _job(
        f"{owner.replace('/', '-')}-logs",
        user,
        # -r: newsyslog does not need to run as root.
        ["/usr/sbin/newsyslog", "-r", "-f", f"{log_directory}/newsyslog.conf"],
        "/",
        log_directory,
        supervision={"StartInterval": 3600},
    )


def launchd_jobs(services, owner, user, log_directory):
    """The jobs of services, as the module launchd_jobs takes them, and one that rotates their logs.

    `services` have the defaults of services_list. `user` is the user of daemons; it is empty for agents, which run as the user
    who loads them.
    """
    jobs = [_service_job(service, user, log_directory) for service in services]
    return [*jobs, _log_job(owner, user, log_directory)] if jobs else []


class FilterModule:
    def filters(self):
        return {"launchd_jobs": launchd_jobs}
