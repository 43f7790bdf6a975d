"""The module launchd_jobs against the stand-in of launchd, and that against records of the real one. The processes are real."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from ansible.module_utils.testing import patch_module_args
from helpers import ROOT, executable, load

jobs = load("roles/services/library/launchd_jobs.py")
STAND_IN = ROOT / "testbed/images/macos/stand-in/rootfs/usr"

# Records of `launchctl print gui/501/LABEL`, shortened, with labels and paths of ours. A job of KeepAlive on macOS 27.0, from a
# public file of them, LaunchctlFixtures.swift by sglavoie:
RUNNING = """\
gui/501/org.example.kept = {
\tactive count = 1
\tpath = /Users/me/Library/LaunchAgents/org.example.kept.plist
\ttype = LaunchAgent
\tstate = running

\tprogram = /Users/me/.local/bin/kept
\targuments = {
\t\t/Users/me/.local/bin/kept
\t}

\tenvironment = {
\t\tXPC_SERVICE_NAME => org.example.kept
\t}

\tdomain = gui/501 [100020]
\tminimum runtime = 10
\texit timeout = 5
\truns = 1
\tpid = 1076
\timmediate reason = speculative
\tlast exit code = (never exited)

\tresource coalition = {
\t\tID = 1140
\t\tstate = active
\t\tactive count = 1
\t}

\tspawn type = interactive (4)
\tjob state = running

\tproperties = keepalive | runatload | inferred program
}
"""
# One that waits for its throttle interval, from the tests of jamf's Aftermath, and what follows a kill, from the same file:
WAITING = """\
gui/501/org.example.agent = {
\tactive count = 0
\tpath = /Library/LaunchAgents/org.example.agent.plist
\tstate = spawn scheduled

\tprogram = /Applications/Example.app/Contents/MacOS/agent
\tminimum runtime = 60
\texit timeout = 5
\truns = 311
\tlast terminating signal = Terminated: 15
}
"""
# Its standard error, with exit code 113; for a domain that is not there, 112.
GONE = 'Bad request.\nCould not find service "{}" in domain for user gui: {}\n'
NO_DOMAIN = "Bad request.\nCould not find domain for user gui: 99999\n"
# `launchctl print-disabled gui/501`, of macOS 26 and of older ones.
DISABLED = '\n\tdisabled services = {\n\t\t"org.example.a" => enabled\n\t\t"org.example.b" => disabled\n\t}\n'
DISABLED_ONCE = 'disabled services = {\n\t"org.example.a" => false\n\t"org.example.b" => true\n}\n'

KEEPS = 'trap "" HUP; exec sleep 1000'


def plist(name, script=KEEPS, **keys):
    """A property list of a job that runs a script, which writes its number first as the role's own jobs do."""
    values = {"Label": name, "ProgramArguments": ["/bin/sh", "-c", f'echo $$ >"$0"; {script}', f"{name}.pid"], **keys}
    return plistlib.dumps({"RunAtLoad": True, "KeepAlive": True, "ExitTimeOut": 5, **values}).decode()


class Mac:
    """A folder for property lists, the stand-in of launchd, and the module run as Ansible runs it."""

    def __init__(self, folder, capsys):
        self.home, self.capsys = folder, capsys
        self.agents = folder / "Library/LaunchAgents"
        self.agents.mkdir(parents=True)
        self.domain = f"gui/{os.geteuid()}"
        environment = {**os.environ, "HOME": str(folder)}
        self.launchd = subprocess.Popen([sys.executable, "-S", STAND_IN / "libexec/launchd"], env=environment)
        while not (folder / "socket").exists():
            time.sleep(0.02)

    def call(self, *words):
        return subprocess.run(["launchctl", *words], capture_output=True, text=True, check=False)

    def state(self, name):
        done = self.call("print", f"{self.domain}/{name}")
        return jobs.parse_print(done.stdout) if done.returncode == 0 else None

    def pid(self, name):
        return jobs.process(self.state(name))

    def write(self, name, text, mode=0o644):
        path = self.agents / f"{name}.plist"
        path.write_text(text)
        path.chmod(mode)
        return path

    def job(self, name, script=KEEPS, settle=0.3, restart_on=(), **keys):
        content = plist(name, script, WorkingDirectory=str(self.home), **keys)
        files = {"pid_file": str(self.home / f"{name}.pid"), "restart_on": [str(path) for path in restart_on]}
        return {"name": name, "content": content, "settle": settle, **files}

    def run(self, *listed, owner="app/web", check=False):
        arguments = {"owner": owner, "jobs": list(listed), "directory": str(self.agents), "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            jobs.main()
        return json.loads(self.capsys.readouterr().out)


@pytest.fixture
def mac(tmp_path, capsys, monkeypatch):
    # Apple's own plutil has its say where there is one.
    for program in ("launchctl",) if shutil.which("plutil") else ("launchctl", "plutil"):
        executable(tmp_path / "bin" / program, (STAND_IN / "bin" / program).read_text())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LAUNCHD_SOCKET", str(tmp_path / "socket"))
    found = Mac(tmp_path, capsys)
    yield found
    for path in found.agents.glob("*.plist"):
        found.call("bootout", f"{found.domain}/{path.stem}")
    found.launchd.kill()
    found.launchd.wait()


def until(check, seconds=15):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


# The module


def test_jobs_are_loaded_and_then_left_alone(mac):
    listed = (mac.job("a"), mac.job("b"))
    result = mac.run(*listed)
    assert (result["changed"], result["started"]) == (True, ["a", "b"])
    before = [mac.pid("a"), mac.pid("b")]
    assert all(before)
    result = mac.run(*listed)
    assert (result["changed"], result["diff"]) == (False, [])
    assert [mac.pid("a"), mac.pid("b")] == before


def test_a_changed_property_list_is_loaded_and_the_others_are_left_alone(mac):
    mac.run(mac.job("a"), mac.job("b"))
    before = mac.pid("a")
    result = mac.run(mac.job("a"), mac.job("b", ExitTimeOut=7))
    assert (result["restarted"], result["started"]) == (["b"], [])
    assert mac.state("b")["exit timeout"] == "7"
    assert mac.pid("a") == before
    assert [diff["before_header"] for diff in result["diff"]] == [str(mac.agents / "b.plist")]


def test_a_property_list_is_its_owners_alone_to_write_whatever_the_umask(mac):
    before = os.umask(0)
    try:
        assert not mac.run(mac.job("a")).get("failed")
        assert mac.agents.joinpath("a.plist").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_run_that_was_killed_before_the_load_is_made_good(mac):
    """It had booted out the job, and perhaps written the file."""
    mac.run(mac.job("a"))
    mac.call("bootout", f"{mac.domain}/a")
    result = mac.run(mac.job("a"))
    assert (result["changed"], result["started"], result["diff"]) == (True, ["a"], [])
    assert mac.pid("a")


def test_a_changed_job_is_booted_out_before_its_file_is_written(mac, monkeypatch):
    mac.run(mac.job("a"))
    seen = []
    write = jobs.Jobs.write
    monkeypatch.setattr(jobs.Jobs, "write", lambda self, *words: seen.append(mac.state("a")) or write(self, *words))
    mac.run(mac.job("a", ExitTimeOut=7))
    assert seen == [None]


def test_a_younger_file_of_restart_on_restarts(mac, tmp_path):
    release = tmp_path / "current"
    release.symlink_to("releases/1")
    listed = (mac.job("a", restart_on=[release]), mac.job("b", restart_on=[tmp_path / "missing"]))
    mac.run(*listed)
    before = mac.pid("b")
    assert not mac.run(*listed)["changed"]
    release.unlink()
    release.symlink_to("releases/2")
    assert mac.run(*listed)["restarted"] == ["a"]
    assert mac.pid("b") == before
    assert not mac.run(*listed)["changed"]


def test_a_process_that_left_no_record_of_its_start_is_restarted(mac, tmp_path):
    listed = mac.job("a", restart_on=[tmp_path])
    mac.run(listed)
    (tmp_path / "a.pid").write_text("1\n")
    # Its folder is older than the record again.
    os.utime(tmp_path, (0, 0))
    assert mac.run(listed)["restarted"] == ["a"]


def test_an_owners_orphans_go_and_the_others_stay(mac):
    mac.run(mac.job("a"), mac.job("gone"))
    mac.run(mac.job("theirs"), owner="app/celery")
    result = mac.run(mac.job("a"))
    assert result["removed"] == ["gone"]
    assert mac.state("gone") is None
    assert sorted(path.stem for path in mac.agents.iterdir()) == ["a", "theirs"]
    assert mac.pid("theirs")


def test_check_mode_says_what_it_would_do_and_does_nothing(mac):
    mac.run(mac.job("a"), mac.job("gone"))
    before = [mac.pid("a"), mac.pid("gone")]
    result = mac.run(mac.job("a", ExitTimeOut=7), mac.job("new"), check=True)
    assert result["changed"]
    assert (result["removed"], result["restarted"], result["started"]) == (["gone"], ["a"], ["new"])
    assert len(result["diff"]) == 3
    assert [mac.pid("a"), mac.pid("gone")] == before
    assert mac.state("new") is None
    assert sorted(path.stem for path in mac.agents.iterdir()) == ["a", "gone"]


def test_a_job_that_does_not_stay_up_fails_with_its_log_until_it_is_repaired(mac, tmp_path):
    log = str(tmp_path / "a.log")
    dying = mac.job("a", "sleep 0.2; echo last words >&2; exit 3", settle=1, StandardErrorPath=log, ThrottleInterval=60)
    result = mac.run(dying)
    assert result["failed"]
    for words in ("a was started and did not stay up: it is spawn scheduled (exit code 3)", f"log of a, {log}:\nlast words"):
        assert words in result["msg"]
    # The next run sees that it is not up and tries again, rather than calling it done.
    assert mac.run(dying)["failed"]
    result = mac.run(mac.job("a", StandardErrorPath=log, ThrottleInterval=60))
    assert not result.get("failed"), result
    assert mac.pid("a")


def test_a_job_that_is_loaded_and_not_running_is_started(mac):
    listed = mac.job("a", ThrottleInterval=60)
    mac.run(listed)
    os.kill(mac.pid("a"), 9)
    until(lambda: mac.pid("a") is None)
    result = mac.run(listed)
    assert (result["changed"], result["started"]) == (True, ["a"])
    assert mac.pid("a")


def test_a_job_that_runs_now_and_then_need_not_run(mac):
    listed = mac.job("a", "true", KeepAlive=False, RunAtLoad=False, StartInterval=3600)
    assert mac.run(listed)["started"] == ["a"]
    assert mac.state("a")["runs"] == "0"
    assert not mac.run(listed)["changed"]


def test_what_was_disabled_by_hand_is_enabled(mac):
    mac.run(mac.job("a"))
    mac.call("bootout", f"{mac.domain}/a")
    mac.call("disable", f"{mac.domain}/a")
    assert mac.run(mac.job("a"))["started"] == ["a"]
    assert mac.pid("a")
    assert not mac.run(mac.job("a"))["changed"]


def test_a_job_has_its_time_to_stop(mac, tmp_path):
    """Longer than launchctl waits."""
    slow = mac.job("a", "trap 'sleep 2; echo done >finished; exit' TERM; while :; do sleep 0.1; done", ExitTimeOut=20)
    mac.run(slow)
    assert mac.run()["removed"] == ["a"]
    assert (tmp_path / "finished").exists()
    assert mac.state("a") is None


def test_a_property_list_that_is_none_is_refused_before_anything_is_touched(mac):
    mac.run(mac.job("a"))
    before = mac.pid("a")
    for content, words in (("<plist><dict>", "is none"), (plist("other"), "has the label 'other'")):
        result = mac.run({**mac.job("b"), "content": content})
        assert result["failed"]
        assert words in result["msg"]
    assert mac.pid("a") == before


def test_what_plutil_refuses_is_not_loaded(mac):
    executable(mac.home / "bin/plutil", "import sys; sys.exit('<stdin>: Unexpected character' if '-lint' in sys.argv else 0)")
    result = mac.run(mac.job("a"))
    assert "plutil refuses" in result["msg"]
    assert "Unexpected character" in result["msg"]
    assert list(mac.agents.iterdir()) == []


def test_owners_with_two_hyphens_stay_apart(mac):
    mac.run(mac.job("a"), owner="my--app/web")
    assert plistlib.loads(mac.agents.joinpath("a.plist").read_bytes())["Label"] == "a"
    assert mac.run(owner="my--app/celery")["removed"] == []
    assert mac.run(owner="my--app/web")["removed"] == ["a"]


def test_a_host_without_launchd_is_told_so(mac, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "no launchctl" in mac.run(mac.job("a"))["msg"]


# What is read of launchctl, from its records


def test_records_of_jobs_are_read():
    running, waiting = jobs.parse_print(RUNNING), jobs.parse_print(WAITING)
    assert (jobs.process(running), jobs.runs(running), running["state"], running["exit timeout"]) == (1076, 1, "running", "5")
    assert (jobs.process(waiting), jobs.runs(waiting), waiting["state"]) == (None, 311, "spawn scheduled")
    assert running["last exit code"] == "(never exited)"
    assert "ID" not in running, "that is its coalition's"


def test_records_of_disabled_jobs_are_read():
    assert jobs.parse_disabled(DISABLED) == jobs.parse_disabled(DISABLED_ONCE) == ["org.example.b"]


# The stand-in: what it prints and refuses, beside the records


def shape(line):
    """A line without what differs from job to job."""
    return re.sub(r" = .*", "", line) if " = " in line and not line.endswith("{") else line


def test_what_the_stand_in_prints_of_a_job_is_in_the_record_of_the_real_one(mac):
    mac.run(mac.job("org.example.kept"))
    printed = mac.call("print", f"{mac.domain}/org.example.kept").stdout.replace(mac.domain, "gui/501").splitlines()
    recorded = [shape(line) for line in RUNNING.splitlines()]
    assert [line for line in map(shape, printed) if line not in recorded] == []
    assert printed[0] == RUNNING.splitlines()[0]
    assert {line for line in printed if line in RUNNING.splitlines()} >= {"\tstate = running", "\truns = 1", "\tactive count = 1"}


def test_what_the_stand_in_prints_of_a_job_that_waits(mac):
    mac.run(mac.job("a", ThrottleInterval=60))
    os.kill(mac.pid("a"), 15)
    until(lambda: mac.pid("a") is None)
    state = mac.state("a")
    assert (state["state"], state["last terminating signal"]) == ("spawn scheduled", "Terminated: 15")


def test_what_the_stand_in_says_of_what_is_not_there(mac):
    done = mac.call("print", f"{mac.domain}/nope")
    assert (done.returncode, done.stderr) == (113, GONE.format("nope", os.geteuid()))
    done = mac.call("print", "gui/99999")
    assert (done.returncode, done.stderr) == (112, NO_DOMAIN)
    done = mac.call("bootout", f"{mac.domain}/nope")
    assert (done.returncode, done.stderr) == (3, "Boot-out failed: 3: No such process\n")


def test_what_the_stand_in_refuses_to_load(mac):
    def refused(path, domain=mac.domain):
        done = mac.call("bootstrap", domain, str(path))
        return done.returncode, done.stderr.splitlines()[0] if done.stderr else ""

    assert refused(mac.write("bad", "no plist")) == (5, "Bootstrap failed: 5: Input/output error")
    assert refused(mac.write("empty", plistlib.dumps({"Label": "empty"}).decode()))[0] == 5
    assert refused(mac.write("open", plist("open"), 0o666)) == (122, "Bootstrap failed: 122: Path had bad ownership/permissions")
    good = mac.write("good", plist("good", WorkingDirectory=str(mac.home)))
    assert refused(good, "gui/99999") == (125, "Bootstrap failed: 125: Domain does not support specified action")
    assert refused(good) == (0, "")
    assert refused(good) == (37, "Bootstrap failed: 37: Operation already in progress")
    mac.call("bootout", f"{mac.domain}/good")
    mac.call("disable", f"{mac.domain}/good")
    assert refused(good) == (119, "Bootstrap failed: 119: Service is disabled")


def test_the_stand_in_kills_what_does_not_end_in_its_time_and_what_is_left_of_its_group(mac, tmp_path):
    deaf = 'sleep 1001 & echo $! >child; trap "" TERM; while :; do sleep 0.1; done'
    mac.run(mac.job("a", deaf, ExitTimeOut=1))
    child = int((tmp_path / "child").read_text())
    done = mac.call("bootout", f"{mac.domain}/a")
    assert (done.returncode, done.stderr) == (36, "Boot-out failed: 36: Operation now in progress\n")
    until(lambda: mac.state("a") is None)
    # Where nobody waits for it, it stays as a zombie.
    until(lambda: subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True).stdout[:1] in (b"", b"Z"))


def test_the_stand_in_loads_what_lies_in_the_folder_at_login(mac, capsys):
    mac.run(mac.job("a"))
    before = mac.pid("a")
    mac.launchd.kill()
    mac.launchd.wait()
    os.kill(before, 9)
    (mac.home / "socket").unlink()
    mac.launchd = subprocess.Popen([sys.executable, "-S", STAND_IN / "libexec/launchd"], env={**os.environ, "HOME": str(mac.home)})
    until(lambda: (mac.home / "socket").exists())
    assert mac.pid("a") not in (None, before)
