"""Converts entries of services_list to property lists of launchd."""

from __future__ import annotations

import plistlib

# launchd reads no environment file, and all users can read a property list. So a shell reads the environment files and then
# executes the command. Arguments: the PID file, the environment files, --, the command.
START = 'set -e; echo $$ >"$0"; set -a; while [ "$1" != -- ]; do . "$1"; shift; done; set +a; shift; exec "$@"'


def _job(name, user, command, directory, log_directory, *, environment=None, supervision, restart_on=()):
    """Return a job for the module launchd_jobs. `supervision` has the keys that control when launchd starts and stops the job."""
    # Aqua is the session of a user who is logged in at the screen, Background that of a user who is logged in only over SSH.
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
        ["/bin/sh", "-c", START, pid_file, *service["environment_files"], "--", *service["command"]],
        service["directory"],
        log_directory,
        environment=service["environment"],
        restart_on=service["restart_on"],
        supervision={
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 5,
            # The first process gets TERM. When it has exited, or at the timeout, launchd kills its process group.
            "ExitTimeOut": service["stop_timeout"],
            "AbandonProcessGroup": False,
            # With the default type, Standard, macOS throttles the job in favour of apps.
            "ProcessType": "Interactive",
            "SoftResourceLimits": open_files,
            "HardResourceLimits": open_files,
        },
    )


def _log_job(owner, user, log_directory):
    """Return a job that rotates the logs every hour.

    The job runs as the services' user, so it can access only that user's files.
    """
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
    """Return the jobs of services for the module launchd_jobs, and a job that rotates their logs.

    `services` is services_list with all defaults. `user` is the user of daemons. It is empty for agents, which run as the user
    who loads them.
    """
    jobs = [_service_job(service, user, log_directory) for service in services]
    return [*jobs, _log_job(owner, user, log_directory)] if jobs else []


class FilterModule:
    def filters(self):
        return {"launchd_jobs": launchd_jobs}
