"""Tests the app `emails` in a new project per Django version, with the code from docs/emails-in-your-project.md."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import pytest
import requests

PROJECT = Path(__file__).resolve().parents[3]
DOCUMENT = (PROJECT / "docs/emails-in-your-project.md").read_text()
# The Django version, and one of the two documented ways to set the mail server.
FORMS = [("5.2", "EMAIL_BACKEND"), ("6.0", "EMAIL_BACKEND"), ("6.1", "EMAIL_BACKEND"), ("6.1", "MAILERS")]
SERVICES = {
    "relay": "manage.py relay",
    "worker": "celery -A shop worker -Q mail.v1,maintenance.v1",
    "web": "manage.py runserver --noreload 0.0.0.0:8000",
}
# Code that is not in the document: URLs, a view that fails, and a message that uses every feature of messages.
URLS = """
import email.message
from email.mime.image import MIMEImage

import django
from django.core.mail import EmailMultiAlternatives
from django.http import HttpResponse
from django.urls import path

from shop.views import order

PNG = b"\\x89PNG"


def order_and_fail(request, number):
    order(request, number)
    raise RuntimeError


def invoice(request, number):
    message = EmailMultiAlternatives(f"Räkning {number}", "Text", None, ["Ä <one@example.net>"], cc=["two@example.net"])
    message.attach_alternative("<img src='cid:logo'>", "text/html")
    message.attach("räkning.csv", "a;b\\nc;d", "text/csv")
    if django.VERSION >= (6, 0):
        image = email.message.MIMEPart()
        image.set_content(PNG, "image", "png", disposition="inline", cid="<logo>")
    else:
        image = MIMEImage(PNG, "png")
        image["Content-ID"] = "<logo>"
    message.attach(image)
    message.send()
    return HttpResponse("sent")


urlpatterns = [
    path("order/<str:number>", order),
    path("fail/<str:number>", order_and_fail),
    path("invoice/<str:number>", invoice),
]
"""


def lines_for(path):
    """The document's code block that starts with the comment `# PATH`."""
    (block,) = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", DOCUMENT, re.DOTALL)
    return block


class Project:
    """A project on the host, in /srv/VERSION-FORM."""

    def __init__(self, host, version, form):
        self.host, self.version, self.form = host, version, form
        self.folder, self.bin = f"/srv/{version}-{form}", f"/srv/django-{version}/bin"

    def sh(self, command):
        with self.host.sudo():
            return self.host.check_output(command)

    def install(self, wheel):
        self.sh(f"python3 -m venv {self.bin.removesuffix('/bin')}")
        # An earlier run may have installed a different wheel of the same version.
        self.sh(f"{self.bin}/pip uninstall --quiet --yes {Path(wheel).name.partition('-')[0]}")
        self.sh(f"{self.bin}/pip install --quiet --only-binary :all: {wheel} 'django~={self.version}.0'")

    def create(self):
        with self.host.sudo("postgres"):
            self.host.check_output("dropdb --if-exists --force shop && createdb --owner=shop shop")
        self.sh(f"rm -rf {self.folder} && mkdir {self.folder} && {self.bin}/django-admin startproject shop {self.folder}")
        if self.form != "MAILERS":
            self.sh(f"sed -i '/^# Email$/,$ d' {self.folder}/shop/settings.py")
        self.write("settings", lines_for("shop/settings.py") + lines_for(f"shop/settings.py with {self.form}"), append=True)
        for name in ("celery", "__init__", "views"):
            self.write(name, lines_for(f"shop/{name}.py"))
        self.write("urls", URLS)

    def write(self, name, text, append=False):
        encoded = base64.b64encode(text.encode()).decode()
        self.sh(f"echo {encoded} | base64 --decode {'>>' if append else '>'} {self.folder}/shop/{name}.py")

    def run(self, command, *options):
        """Runs a program of the venv as a systemd unit with the project's environment."""
        program = f"{self.bin}/python" if command.startswith("manage.py") else ""
        properties = {
            "User": "nobody",
            "Group": "nogroup",
            "WorkingDirectory": self.folder,
            "EnvironmentFile": "/etc/shop.env",
            "Environment": "PYTHONUNBUFFERED=1",
            "KillMode": "mixed",
        }
        words = [*options, *(f"--property={name}={value}" for name, value in properties.items())]
        command = f"{program} {command}" if program else f"{self.bin}/{command}"
        return self.sh(f"systemd-run --quiet {shlex.join(words)} {command}")

    def manage(self, command):
        return self.run(f"manage.py {command}", "--wait", "--pipe", "--collect")

    def start(self):
        """Starts the services and waits until relay and worker are ready."""
        self.started = self.sh("date +%s")
        for name, command in SERVICES.items():
            options = ["--service-type=exec"] if name == "web" else ["--service-type=notify", "--property=WatchdogSec=60"]
            self.run(command, f"--unit=example-{name}", *options)

    def stop(self):
        """Stops the services; returns the result of each service."""
        units = " ".join(f"example-{name}" for name in SERVICES)
        results = self.sh(f"systemctl stop {units}; systemctl show --property Result --value {units}").split()
        return dict(zip(SERVICES, results, strict=True))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of app/, because setuptools writes files to its folder and reuses old files."""
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".venv", "build", "*.egg-info", "__pycache__")
    shutil.copytree(PROJECT / "app", folder / "app", ignore=leave)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", folder / "app"]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_on_host(host, wheel):
    copied = host.ansible("copy", f"src={wheel} dest=/srv/{wheel.name} mode=0644", check=False, become=True)
    return copied["dest"]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def project(host, wheel_on_host, request):
    """A project with running services."""
    project = Project(host, *request.param)
    project.stop()
    project.install(wheel_on_host)
    project.create()
    project.manage("migrate --verbosity=0")
    project.start()
    yield project
    project.stop()


@pytest.fixture
def number(project):
    return f"{project.version}-{project.form}-{uuid.uuid4()}"


@pytest.fixture
def get(site, eventually):
    """Waits for the web server, then requests a page."""

    def status(path):
        return eventually(lambda: requests.get(f"{site}/{path}", timeout=20).status_code)

    return status


def test_wheel_contains_only_the_app(wheel):
    listed = subprocess.run(["git", "ls-files", "emails"], cwd=PROJECT / "app", check=True, capture_output=True, text=True)
    held = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in held if ".dist-info/" not in name) == sorted(listed.stdout.split())


def test_broker_permissions_match_the_document(host):
    with host.sudo():
        line = host.check_output("rabbitmqctl -q list_user_permissions shop --no-table-headers")
    (names,) = re.findall(r"```\n(\^.*)\n```", DOCUMENT)
    assert line.split("\t") == ["shop", names, names, names]


def test_system_check_and_migrations_are_clean(project):
    assert "no issues" in project.manage("check")
    assert project.manage("makemigrations --check --dry-run").strip() == "No changes detected"


def test_emails_of_a_successful_request_arrive(get, inbox, number, eventually):
    assert get(f"order/{number}") == 200
    for subject in (f"Order {number}", f"Pack order {number}"):
        eventually(lambda subject=subject: inbox().count(subject) == 1)


def test_failed_request_sends_no_email(get, inbox, number, eventually):
    assert get(f"fail/{number}") == 500
    # Emails are sent in the order in which they are stored.
    assert get(f"order/{number}-later") == 200
    eventually(lambda: f"Pack order {number}-later" in inbox())
    assert not {f"Order {number}", f"Pack order {number}"} & set(inbox())


def test_message_arrives_complete(get, variables, number, eventually):
    assert get(f"invoice/{number}") == 200
    port = variables["testbed_mail_published"]["1080"]

    def both():
        mails = requests.get(f"http://127.0.0.1:{port}/api/email", timeout=10).json()
        found = [mail for mail in mails if mail["subject"] == f"Räkning {number}"]
        return found if len(found) == 2 else None

    for mail in eventually(both):
        assert [each["address"] for name in ("from", "to", "cc") for each in mail[name]] == [
            *("shop@example.org", "one@example.net", "two@example.net")
        ]
        assert mail["text"].strip() == "Text"
        # The mail catcher embeds the image with this Content-ID.
        assert "src='data:image/png;base64,iVBORw=='" in mail["html"]
        table, image = mail["attachments"]
        assert (table["filename"], table["contentType"], table["size"]) == ("räkning.csv", "text/csv", 7)
        assert (image["contentId"], image["contentType"], image["size"]) == ("logo", "image/png", 4)


def test_services_stop_cleanly(project):
    assert project.stop() == dict.fromkeys(SERVICES, "success")
    for name in ("relay", "worker"):
        log = project.sh(f"journalctl --output=cat --unit=example-{name} --since=@{project.started}")
        assert "ERROR" not in log and "Traceback" not in log, log
