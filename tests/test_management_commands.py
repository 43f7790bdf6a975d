"""Tests the steps that run in one process of a project: management commands, imports and checks."""

from __future__ import annotations

import functools
import io
import json
import os
import sys

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils import django_runner
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.management_commands import run
from ansible_collections.django_celery.stack.plugins.modules import management_commands
from helpers import executable

MANAGE = """
import os, sys
import project

print(f"{sys.argv[1]} process {os.getpid()} import {project.IMPORTED} key {os.environ['KEY']}")
if sys.argv[1] == "read":
    print("read:", sys.stdin.read())
if sys.argv[1] == "ask":
    input("Are you sure? ")
if sys.argv[1] == "child":
    os.system("echo from a child")
if sys.argv[1] == "fail":
    print("the reason", file=sys.stderr)
    sys.exit(3)
if sys.argv[1] == "say":
    sys.exit("the message")
if sys.argv[1] == "write":
    open("written", "w").close()
if sys.argv[1] == "arguments":
    print(sys.argv[2:])
"""


@pytest.fixture
def project(tmp_path):
    """A project with a manage.py and the Python of these tests as its virtual environment.

    Returns a function that runs its commands.
    """
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "manage.py").write_text(MANAGE)
    (tmp_path / "release" / "project.py").write_text("import os\nIMPORTED = os.urandom(4).hex()\n")
    python = f"import os, sys\nos.execv({sys.executable!r}, ['python', *sys.argv[1:]])\n"
    executable(tmp_path / "release" / "venv" / "bin" / "python", python)
    (tmp_path / "environment").write_text("KEY='it'\\''s $HOME'\n")

    def commands(*asked, manage="manage.py", environment=None):
        full = [{"stdin": None, "unchanged": None, **each} for each in asked]
        return run(str(tmp_path / "environment"), str(tmp_path / "release"), manage, environment or {}, full)

    return commands


def test_commands_share_a_process_and_its_modules(project):
    one, two = project({"command": "one"}, {"command": "two"})
    assert one["stdout"].split()[1:] == two["stdout"].split()[1:]
    assert one["stdout"].startswith("one process")
    assert one["stdout"].rstrip().endswith("key it's $HOME")


def test_arguments_are_split_as_a_shell_does(project):
    (result,) = project({"command": "arguments --name 'two words'"})
    assert "['--name', 'two words']" in result["stdout"]


@pytest.mark.parametrize("program", ["source/manage.py", "shop", "shop.manage"])
def test_commands_run_with_a_script_elsewhere_or_a_module(project, tmp_path, program):
    release = tmp_path / "release"
    for name in ("source/manage.py", "shop/__main__.py", "shop/manage.py"):
        (release / name).parent.mkdir(exist_ok=True)
        (release / name).write_text(f"import sys\nprint({name!r}, sys.argv[1:])\n")
    wanted = {"source/manage.py": "source/manage.py", "shop": "shop/__main__.py", "shop.manage": "shop/manage.py"}[program]
    for command in ("check --deploy", "migrate"):
        (result,) = project({"command": command}, manage=program)
        assert result["stdout"] == f"{wanted} {command.split()}\n"
    with pytest.raises(Failure, match="`no_such_module migrate` failed in "):
        project({"command": "migrate"}, manage="no_such_module")


def test_variables_override_those_of_the_file(project):
    (result,) = project({"command": "one"}, environment={"KEY": "another"})
    assert result["stdout"].rstrip().endswith("key another")


def test_standard_input_reaches_its_command_only(project):
    one, two = project({"command": "read", "stdin": "a secret"}, {"command": "read"})
    assert one["stdout"].endswith("read: a secret\n")
    assert two["stdout"].endswith("read: \n")


def test_question_fails_and_does_not_wait(project):
    with pytest.raises(Failure, match="EOFError"):
        project({"command": "ask"})


def test_output_of_a_child_does_not_disturb_the_results(project):
    one, two = project({"command": "child"}, {"command": "two"})
    assert (one["command"], two["command"]) == ("child", "two")


@pytest.mark.parametrize(("command", "reason"), [("fail", "the reason"), ("say", "the message")])
def test_failure_names_the_command_and_ends_the_run(project, tmp_path, command, reason):
    with pytest.raises(Failure, match=reason) as failure:
        project({"command": "one"}, {"command": command}, {"command": "write"})
    assert str(failure.value).startswith(f"`manage.py {command}` failed in ")
    assert "one process" not in str(failure.value)
    assert not (tmp_path / "release" / "written").exists()


def test_project_that_does_not_import_shows_its_traceback(project, tmp_path):
    (tmp_path / "release" / "project.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(Failure, match="No module named 'nothing_of_this_name'"):
        project({"command": "one"})


def test_virtual_environment_that_is_missing_is_named(project, tmp_path):
    (tmp_path / "release" / "venv" / "bin" / "python").unlink()
    with pytest.raises(Failure, match="did not start"):
        project({"command": "one"})


@pytest.mark.parametrize(("unchanged", "changed"), [(None, True), ("^one process", False), ("^two", True), ("", False)])
def test_output_shows_whether_something_changed(project, unchanged, changed):
    (result,) = project({"command": "one", "unchanged": unchanged})
    assert result["changed"] is changed


def test_no_commands_start_no_process(project, tmp_path):
    (tmp_path / "release" / "venv" / "bin" / "python").unlink()
    assert project() == []


@pytest.mark.parametrize(("command", "words"), [("one", {"changed": True}), ("fail", {"failed": True})])
def test_module_prints_its_result(project, tmp_path, capsys, command, words):
    options = {"directory": str(tmp_path / "release"), "environment_file": str(tmp_path / "environment")}
    with patch_module_args({**options, "steps": [{"command": command}]}), pytest.raises(SystemExit):
        management_commands.main()
    assert words.items() <= json.loads(capsys.readouterr().out).items()


def test_check_mode_runs_no_command(project, tmp_path, capsys):
    options = {"directory": str(tmp_path / "release"), "environment_file": str(tmp_path / "environment")}
    arguments = {**options, "steps": [{"command": "write"}], "_ansible_check_mode": True}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        management_commands.main()
    assert json.loads(capsys.readouterr().out)["steps"] == []
    assert not (tmp_path / "release" / "written").exists()


# ---- The runner ----


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """Sets up the test's process as a process of the project's Python."""
    monkeypatch.chdir(tmp_path / "release")
    monkeypatch.syspath_prepend(str(tmp_path / "release"))
    monkeypatch.setenv("KEY", "value")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    yield
    sys.modules.pop("project", None)


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [("one", 0, "one process"), ("fail", 3, "the reason"), ("say", 1, "the message"), ("ask", 1, "EOFError")],
)
def test_runner_returns_what_a_command_did(here, command, code, output):
    result = django_runner.run(functools.partial(django_runner.manage, "manage.py"), command, None)
    assert result["code"] == code
    assert output in result["stdout"] + result["stderr"]


def test_runner_stops_at_the_first_failure(here, tmp_path, monkeypatch):
    asked = [{"action": "command", "argument": name, "stdin": None} for name in ("one", "fail", "write")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"manage": "manage.py", "environment": {}, "steps": asked})))
    with (tmp_path / "results").open("w") as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            django_runner.main()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert [result["code"] for result in json.loads((tmp_path / "results").read_text())] == [0, 3]
    assert not (tmp_path / "release" / "written").exists()


WSGI = """
def application(environ, start_response):
    pass

class Callable:
    def __call__(self, environ, start_response):
        pass

class Asynchronous:
    async def __call__(self, scope, receive, send):
        pass

async def asgi(scope, receive, send):
    pass

instance, asgi_instance, number = Callable(), Asynchronous(), 5
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("application", ""),
        ("instance", ""),
        ("asgi", "is an ASGI application"),
        ("asgi_instance", "is an ASGI application"),
        ("number", "can't be called"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_import_of_a_wsgi_application(project, tmp_path, name, problem):
    (tmp_path / "release" / "served.py").write_text(WSGI)
    if not problem:
        (result,) = project({"wsgi": f"served:{name}"})
        assert result["changed"] is False
        return
    with pytest.raises(Failure, match=problem) as failure:
        project({"wsgi": f"served:{name}"})
    assert str(failure.value).startswith(f"The WSGI application served:{name} does not work in ")


HANDLER = "class WSGIHandler:\n    def __call__(self, environ, start_response):\n        pass\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("asgi", ""),
        ("asgi_instance", ""),
        # A wrapper around an ASGI application need not be a coroutine function.
        ("application", ""),
        ("django_wsgi", "is a WSGI application"),
        ("number", "can't be called"),
    ],
)
def test_import_of_an_asgi_application(project, tmp_path, name, problem):
    handlers = tmp_path / "release" / "django" / "core" / "handlers"
    handlers.mkdir(parents=True)
    (handlers / "wsgi.py").write_text(HANDLER)
    text = WSGI + "\nfrom django.core.handlers.wsgi import WSGIHandler\ndjango_wsgi = WSGIHandler()\n"
    (tmp_path / "release" / "served.py").write_text(text)
    if not problem:
        assert project({"asgi": f"served:{name}"})[0]["changed"] is False
        return
    with pytest.raises(Failure, match=problem) as failure:
        project({"asgi": f"served:{name}"})
    assert str(failure.value).startswith(f"The ASGI application served:{name} does not work in ")


def test_wsgi_module_that_raises_shows_its_error(project, tmp_path):
    (tmp_path / "release" / "served.py").write_text("raise ValueError('the cause')")
    with pytest.raises(Failure, match="ValueError: the cause"):
        project({"wsgi": "served:application"})


# A stand-in for Celery, which the controller does not have. The scenario celery uses the real one.
CELERY = """
import importlib

class App:
    loader = property(lambda self: self)
    def import_default_modules(self):
        importlib.import_module("shop_tasks")
    def finalize(self):
        pass

def find_app(name):
    assert name == "shop"
    return App()
"""


def test_import_of_a_celery_application_imports_its_tasks(project, tmp_path):
    package = tmp_path / "release" / "celery" / "app"
    package.mkdir(parents=True)
    (package / "utils.py").write_text(CELERY)
    with pytest.raises(Failure, match="No module named 'shop_tasks'") as failure:
        project({"celery": "shop"})
    assert str(failure.value).startswith("The Celery application shop does not work in ")
    (tmp_path / "release" / "shop_tasks.py").write_text("")
    assert project({"celery": "shop"})[0]["celery"] == "shop"


@pytest.fixture
def modules(here, tmp_path):
    """Writes modules of the project, and removes them from Python's cache afterwards."""
    before = set(sys.modules)

    def write(texts):
        for name, text in texts.items():
            path = tmp_path / "release" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "code"), [("application", 0), ("asgi", 1), ("asgi_instance", 1), ("number", 1), ("missing", 1)])
def test_runner_imports_a_wsgi_application(modules, name, code):
    modules({"served": WSGI})
    assert django_runner.run(django_runner.import_wsgi, f"served:{name}", None)["code"] == code


# Stand-ins for Django's storages. The scenario projects uses the real ones.
STATIC = {
    "django/__init__": "def setup():\n    pass\n",
    "django/apps": "class apps:\n    is_installed = staticmethod(lambda name: {installed})\n",
    "django/conf": "class settings:\n    STATIC_ROOT = {root!r}\n",
    "django/contrib/staticfiles/storage": "from django.core.files.storage import {storage}\nstaticfiles_storage = {storage}()\n",
    "django/core/files/storage": "class FileSystemStorage:\n    pass\nclass Bucket:\n    pass\n",
}


@pytest.mark.parametrize(
    ("installed", "root", "storage", "code", "output"),
    [
        (True, "staticfiles", "FileSystemStorage", 0, "collected ['--noinput', '--verbosity', '0']"),
        (True, None, "FileSystemStorage", 0, "the project has no STATIC_ROOT"),
        (True, None, "Bucket", 0, "collected"),
        (False, None, "FileSystemStorage", 0, "INSTALLED_APPS of the project lacks django.contrib.staticfiles"),
        (True, "/srv/static", "FileSystemStorage", 1, "STATIC_ROOT is /srv/static, which is not in the release"),
    ],
)
def test_runner_collects_static_files_into_the_release(modules, tmp_path, installed, root, storage, code, output):
    modules({name: text.format(installed=installed, root=root, storage=storage) for name, text in STATIC.items()})
    (tmp_path / "release" / "manage.py").write_text("import sys\nprint('collected', sys.argv[2:])\n")
    result = django_runner.run(functools.partial(django_runner.collect_static, "manage.py"), "collect", None)
    assert result["code"] == code
    assert output in result["note" if result["note"] else "stderr" if code else "stdout"]


def test_reason_for_no_static_files_is_returned(project, tmp_path):
    for name, text in STATIC.items():
        path = tmp_path / "release" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(installed=False, root=None, storage="FileSystemStorage"))
    (result,) = project({"static": "collect"})
    assert (result["changed"], result["note"]) == (False, "INSTALLED_APPS of the project lacks django.contrib.staticfiles")


def test_runner_imports_an_asgi_application(modules):
    wsgi = "\nfrom django.core.handlers.wsgi import WSGIHandler\ndjango_wsgi = WSGIHandler()\n"
    modules({"django/core/handlers/wsgi": HANDLER, "served": WSGI + wsgi})
    codes = [django_runner.run(django_runner.import_asgi, f"served:{name}", None)["code"] for name in ("asgi", "django_wsgi")]
    assert codes == [0, 1]


def test_runner_imports_a_celery_application(modules):
    modules({"celery/app/utils": CELERY, "shop_tasks": ""})
    assert django_runner.run(django_runner.import_celery, "shop", None) == {"code": 0, "stdout": "", "stderr": "", "note": ""}


# Stand-ins for Django, which the controller does not have. The scenario django uses the real one.
SETTINGS = """
class settings:
    DATABASES = {{"default": {{"ENGINE": "django.db.backends.{engine}", "NAME": {name!r}}}}}
"""
BROKEN_SETTINGS = """
class Settings:
    @property
    def DATABASES(self):
        raise ValueError("no SECRET_KEY")
settings = Settings()
"""


@pytest.mark.parametrize(
    ("engine", "name", "code"),
    [
        ("sqlite3", "db.sqlite3", 1),
        ("sqlite3", "./data/../db.sqlite3", 1),
        ("sqlite3", "/var/lib/shop/db.sqlite3", 0),
        ("sqlite3", ":memory:", 0),
        ("sqlite3", "file:memorydb?mode=memory", 0),
        ("postgresql", "db.sqlite3", 0),
        ("postgresql", None, 0),
    ],
)
def test_runner_refuses_a_database_file_in_the_release(modules, engine, name, code):
    modules({"django/conf": SETTINGS.format(engine=engine, name=name)})
    result = django_runner.run(django_runner.databases_outside_release, "outside", None)
    assert result["code"] == code
    assert ("in the release" in result["stderr"]) == bool(code)


def test_settings_that_do_not_load_are_reported_by_the_check(modules):
    modules({"django/conf": BROKEN_SETTINGS})
    assert django_runner.run(django_runner.databases_outside_release, "outside", None)["code"] == 0


LOADER = """
class MigrationLoader:
    def __init__(self, connection):
        self.applied_migrations = {applied}
        self.disk_migrations = {{("shop", "0001"), ("shop", "0002")}}
"""


@pytest.mark.parametrize(("applied", "error"), [([("shop", "0001")], ""), ([("shop", "0001"), ("shop", "0003")], "shop.0003")])
def test_runner_names_migrations_that_the_release_lacks(modules, applied, error):
    modules(
        {
            "django/__init__": "def setup():\n    pass\n",
            "django/db/__init__": "class connections:\n    all = staticmethod(lambda: [None])\n",
            "django/db/migrations/loader": LOADER.format(applied=applied),
        }
    )
    result = django_runner.run(django_runner.unknown_migrations, "known", None)
    assert result["code"] == bool(error)
    assert error in result["stderr"]


CLIENT = """
class Client:
    def __init__(self, raise_request_exception, HTTP_HOST):
        assert not raise_request_exception
        self.host = HTTP_HOST

    def get(self, path):
        self.status_code = {"/healthz": 200, "/broken": 503, "/missing": 404}[path] if self.host == "shop.test" else 400
        self.streaming, self.content = path == "/broken", b"the body"
        return self
"""


@pytest.mark.parametrize(
    ("path", "host", "statuses", "error"),
    [
        ("/healthz", "shop.test", [200], ""),
        ("/healthz", "shop.test", [], ""),
        ("/missing", "shop.test", [], ""),
        ("/missing", "shop.test", [200, 204], "/missing with the Host shop.test returns 404, the body"),
        ("/broken", "shop.test", [], "/broken with the Host shop.test returns 503, "),
        ("/healthz", "other.test", [200], "/healthz with the Host other.test returns 400, the body"),
    ],
)
def test_runner_requests_the_health_path(modules, path, host, statuses, error):
    modules({"django/__init__": "def setup():\n    pass\n", "django/test": CLIENT})
    result = django_runner.run(django_runner.healthy_response, json.dumps({"path": path, "host": host, "statuses": statuses}), None)
    assert (result["code"], result["stderr"].strip()) == (int(bool(error)), error.strip())
