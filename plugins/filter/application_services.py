"""Converts the processes of an application to entries of services_list."""

from __future__ import annotations

import re

# Seconds that a worker may take to stop its pool and close its connections after its longest task.
STOP_SECONDS = 30


def celery_workers_as_services(workers, name, app, program, log_level):
    """Return one service per worker. `workers` is celery_workers with all defaults. `app` is the Celery module."""
    return [_worker_as_service(worker, name, app, program, log_level) for worker in workers]


def _worker_as_service(worker, name, app, program, log_level):
    soft_limit = [f"--soft-time-limit={worker['soft_time_limit']}"] if "soft_time_limit" in worker else []
    return {
        "name": f"{name}-worker@{worker['name']}",
        "description": f"Celery worker {worker['name']} of {name}",
        "type": worker["readiness"],
        "command": [
            program,
            f"--app={app}",
            "worker",
            f"--hostname={worker['name']}@%h",
            f"--queues={','.join(worker['queues'])}",
            f"--pool={worker['pool']}",
            f"--concurrency={worker['concurrency']}",
            f"--prefetch-multiplier={worker['prefetch_multiplier']}",
            f"--time-limit={worker['time_limit']}",
            *soft_limit,
            f"--max-tasks-per-child={worker['max_tasks_per_child']}",
            "--without-gossip",
            "--without-mingle",
            "--task-events",
            f"--loglevel={log_level}",
        ],
        "stop_timeout": worker["time_limit"] + STOP_SECONDS,
        **{option: worker[option] for option in ("memory_max", "tasks_max", "cpu_weight", "watchdog") if option in worker},
    }


def celery_workers_soft_limit_too_high(workers):
    """Return the names of the workers whose soft time limit is not below the time limit."""
    return [worker["name"] for worker in workers if worker.get("soft_time_limit", 0) >= worker["time_limit"]]


def services_with_wrong_limits(services):
    """Return the names of the services with a limit that systemd would ignore: systemd.resource-control(5)."""
    return [service["name"] for service in services if not _limits_are_valid(service)]


def _limits_are_valid(service):
    memory = re.fullmatch(r"[1-9][0-9]*[KMGT]?|[1-9][0-9]?%|100%", service.get("memory_max", "80%"))
    return bool(memory) and service.get("tasks_max", 1) >= 1 and 1 <= service.get("cpu_weight", 1) <= 10000


def django_processes_as_services(processes, name, bin_directory):
    """Return one service per process. A program without an absolute path is in `bin_directory` of the virtual environment."""
    return [_process_as_service(process, name, bin_directory) for process in processes]


def _process_as_service(process, name, bin_directory):
    program, *arguments = process["command"]
    return {
        **process,
        "name": f"{name}-{process['name']}",
        "description": f"{process['name']} of {name}",
        "type": process["readiness"],
        "command": [program if program.startswith("/") else f"{bin_directory}/{program}", *arguments],
    }


def django_timers_as_services(timers, name, bin_directory):
    """Return one service with a schedule per timer. A program without an absolute path is in `bin_directory`."""
    return [_process_as_service({**timer, "readiness": "exec"}, name, bin_directory) for timer in timers]


class FilterModule:
    def filters(self):
        return {
            "celery_workers_as_services": celery_workers_as_services,
            "celery_workers_soft_limit_too_high": celery_workers_soft_limit_too_high,
            "django_processes_as_services": django_processes_as_services,
            "django_timers_as_services": django_timers_as_services,
            "services_with_wrong_limits": services_with_wrong_limits,
        }
