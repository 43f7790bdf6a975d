"""`make app`: all processes run, an email arrives on the mail page, Ctrl-C ends everything."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from django.conf import settings

from tests.test_system import BROKER_URL
from tests.tools import eventually, free_port

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(not BROKER_URL, reason="TEST_BROKER_URL names no broker"),
]


def start(**variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "dev.py"],
        cwd=settings.BASE_DIR,
        env={"PATH": os.environ["PATH"], "BROKER_URL": BROKER_URL, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def get(url: str) -> str:
    with suppress(OSError), urlopen(url, timeout=5) as response:
        return response.read().decode()
    return ""


def children(pid: int) -> set[int]:
    parents = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents.append(
                (int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1]))
            )
    found = {pid}
    while new := {child for child, parent in parents if parent in found} - found:
        found |= new
    return found - {pid}


def test_an_email_arrives_and_ctrl_c_ends_everything():
    web, mail = free_port(), free_port()
    app = start(WEB_PORT=str(web), MAIL_PORT=str(mail))
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(app.stdout), daemon=True)
    try:
        reader.start()
        eventually(lambda: get(f"http://127.0.0.1:{web}/healthz"))
        key = re.search(r"\(key (\S+)\)", "".join(lines))[1]
        assert f"http://127.0.0.1:{mail}/" in "".join(lines)
        body = {"subject": "From make app", "text": "<b>Body</b>", "to": ["bob@example.org"]}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{web}/api/emails", json.dumps(body).encode(), headers)
        assert urlopen(request, timeout=10).status == 202
        page = eventually(
            lambda: "From make app" in (page := get(f"http://127.0.0.1:{mail}/")) and page
        )
        assert "&lt;b&gt;Body" in page
        started = children(app.pid)
        assert len(started) >= 6, "database, mail, web, relay, worker with two children"
        app.send_signal(signal.SIGINT)
        assert app.wait(timeout=40) == 0, "".join(lines)
    finally:
        app.kill()
        app.wait()
        reader.join(timeout=5)
        app.stdout.close()
    assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("name", ["WEB_PORT", "MAIL_PORT"])
def test_a_taken_port_is_named_before_anything_starts(name, live_server):
    app = start(**{"WEB_PORT": "0", "MAIL_PORT": "0", name: live_server.url.rpartition(":")[2]})
    output, _ = app.communicate(timeout=30)
    assert app.returncode == 1
    assert f"set {name} to a free one" in output
    assert "Starting" not in output
