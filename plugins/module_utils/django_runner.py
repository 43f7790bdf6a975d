"""Runs management commands and imports of a Django project in one process, so that the project is imported once.

The module `management_commands` passes this file's text to the project's Python. It needs Django, and Celery to import a Celery
application.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import runpy
import shlex
import sys
import traceback
from typing import Any, Callable, Optional


def manage(program: str, command: str) -> None:
    """Run a management command. The program is a script, such as manage.py, or a module, such as django."""
    sys.argv = [program, *shlex.split(command)]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


def collect_static(program: str, _: str) -> str:
    """Collect the static files. Return the reason if the project has no static files to collect.

    Exits with an error message if STATIC_ROOT is outside of the release, where the build user can't write.
    """
    import django
    from django.apps import apps
    from django.conf import settings

    django.setup()
    if not apps.is_installed("django.contrib.staticfiles"):
        return "INSTALLED_APPS of the project lacks django.contrib.staticfiles"
    from django.contrib.staticfiles.storage import staticfiles_storage
    from django.core.files.storage import FileSystemStorage

    # Other storages, such as a bucket, need no STATIC_ROOT.
    if isinstance(staticfiles_storage, FileSystemStorage):
        if not settings.STATIC_ROOT:
            return "the project has no STATIC_ROOT"
        if not os.path.realpath(settings.STATIC_ROOT).startswith(os.path.realpath(".") + os.sep):
            sys.exit(
                f"STATIC_ROOT is {settings.STATIC_ROOT}, which is not in the release {os.path.realpath('.')}. Each release has its "
                "own static files. Set STATIC_ROOT to a directory in the project, such as BASE_DIR / 'staticfiles'."
            )
    manage(program, "collectstatic --noinput --verbosity 0")
    return ""


def application_named(name: str, kind: str) -> Any:
    """Import an application, such as mailroom.wsgi:application. Exits with an error message if it is not callable."""
    module, _, attribute = name.partition(":")
    application = getattr(importlib.import_module(module), attribute)
    if not callable(application):
        sys.exit(f"{name} is no {kind} application: it can't be called.")
    return application


def import_wsgi(name: str) -> None:
    """Import a WSGI application. Exits with an error message if it is an ASGI application."""
    application = application_named(name, "WSGI")
    if inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(type(application).__call__):
        sys.exit(f"{name} is an ASGI application, and a WSGI application is required, such as the one in wsgi.py.")


def import_asgi(name: str) -> None:
    """Import an ASGI application. Exits with an error message if it is Django's WSGI application."""
    from django.core.handlers.wsgi import WSGIHandler

    if isinstance(application_named(name, "ASGI"), WSGIHandler):
        sys.exit(f"{name} is a WSGI application, and an ASGI application is required, such as the one in asgi.py.")


def import_celery(name: str) -> None:
    """Import a Celery application by the name in celery's option --app, and all its tasks."""
    from celery.app.utils import find_app

    application = find_app(name)
    application.loader.import_default_modules()
    application.finalize()


def databases_outside_release(_: str) -> None:
    """Exit with an error message if a database is a file in the working directory.

    The next release has a different directory, so it would start without this database.
    """
    from django.conf import settings

    try:
        databases = settings.DATABASES
    except Exception:
        # `manage.py check` shows what is wrong with the settings.
        return
    for alias, database in databases.items():
        path = str(database.get("NAME") or "")
        if not database.get("ENGINE", "").endswith("sqlite3") or not path or path.startswith(("file:", ":memory:")):
            continue
        if os.path.realpath(path).startswith(os.path.realpath(".") + os.sep):
            sys.exit(
                f"The database '{alias}' is the file {path} in the release. The services can't write there, and the next release "
                "has a different directory. Use a database server, or a file in the application's directory in /var/lib."
            )


def unknown_migrations(_: str) -> None:
    """Exit with the names of applied migrations that this release does not contain."""
    import django
    from django.db import connections
    from django.db.migrations.loader import MigrationLoader

    django.setup()
    unknown: list[str] = []
    for connection in connections.all():
        loader = MigrationLoader(connection)
        unknown += [".".join(key) for key in loader.applied_migrations if key not in loader.disk_migrations]
    if unknown:
        sys.exit("The database has migrations that this release does not contain: " + ", ".join(sorted(set(unknown))) + ".")


def healthy_response(request: str) -> None:
    """Exit with an error message if the application's response has a status that does not show a working application.

    `request` is JSON: {path, host, statuses}. Without statuses, each status below 500 is accepted.
    """
    import django

    django.setup()
    from django.test import Client

    wanted = json.loads(request)
    client = Client(raise_request_exception=False, HTTP_HOST=wanted["host"])
    response = client.get(wanted["path"])
    if response.status_code not in (wanted["statuses"] or range(100, 500)):
        text = "" if response.streaming else response.content.decode(errors="replace")
        sys.exit(f"{wanted['path']} with the Host {wanted['host']} returns {response.status_code}, {text}")


# An action can return a note that explains why it did nothing.
Action = Callable[[str], Optional[str]]
ACTIONS: dict[str, Action] = {
    "wsgi": import_wsgi,
    "asgi": import_asgi,
    "celery": import_celery,
    "databases": databases_outside_release,
    "migrations": unknown_migrations,
    "health": healthy_response,
}


def run(act: Action, argument: str, stdin: Optional[str]) -> dict[str, Any]:
    """Do one step. Return its exit code, its output and its note."""
    out, errors = io.StringIO(), io.StringIO()
    # A command that asks a question gets no answer and fails.
    sys.stdin = io.StringIO(stdin or "")
    code: Any = 0
    note = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            note = act(argument)
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                errors.write(f"{code}\n")
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": out.getvalue(), "stderr": errors.getvalue(), "note": note or ""}


def main() -> None:
    """Read the program for management commands, variables of the environment and the steps, {action, argument, stdin}, as JSON.

    Do the steps until one fails. Print their results as a JSON list.
    """
    results_fd = os.dup(1)
    # The output of programs that a command starts must not mix with the results.
    os.dup2(2, 1)
    results = []
    asked = json.load(sys.stdin)
    os.environ.update(asked["environment"])
    actions: dict[str, Action] = {
        "command": functools.partial(manage, asked["manage"]),
        "static": functools.partial(collect_static, asked["manage"]),
        **ACTIONS,
    }
    for step in asked["steps"]:
        results.append(run(actions[step["action"]], step["argument"], step["stdin"]))
        if results[-1]["code"]:
            break
    with open(results_fd, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
