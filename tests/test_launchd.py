"""Tests the module launchd_jobs on the launchd stand-in, and the stand-in against records of the real launchd."""

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
from ansible_collections.django_celery.stack.plugins.module_utils import launchd as jobs
from ansible_collections.django_celery.stack.plugins.module_utils.managed_files import ManagedFiles
from ansible_collections.django_celery.stack.plugins.modules import launchd_jobs
from helpers import ROOT, executable

STAND_IN = ROOT / "testbed/images/macos/stand-in/rootfs/usr"

# Records of the real launchctl, each below the address of its publication. They are shortened, and labels and paths are changed.
# Apple documents neither the output of print nor the exit codes of launchctl.
#
# `launchctl print gui/501/LABEL` of a job with KeepAlive, and of one with StartInterval between two runs, on macOS 27.0:
# https://github.com/sglavoie/dev-helpers/blob/e88273dd457ffb72100703f255f277dbcd9594fa/swift/heartbeat/Tests/HeartbeatCoreTests/LaunchctlFixtures.swift
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
BETWEEN = """\
gui/501/org.example.hourly = {
\tactive count = 0
\tpath = /Users/me/Library/LaunchAgents/org.example.hourly.plist
\ttype = LaunchAgent
\tstate = not running

\tprogram = /Users/me/.local/bin/hourly
\tdomain = gui/501 [100020]
\tminimum runtime = 10
\texit timeout = 5
\truns = 18
\tlast exit code = 0

\tresource coalition = {
\t\tID = 1150
\t\tstate = active
\t\tactive count = 1
\t}

\trun interval = 900 seconds
}
"""
# A job with KeepAlive during its throttle interval:
# https://github.com/jamf/aftermath/blob/623aa77df7d7c37bf871f62248b5e2a5e66e3a63/tests/aftermath/AftermathTests.swift
WAITING = """\
gui/501/org.example.agent = {
\tactive count = 0
\tpath = /Library/LaunchAgents/org.example.agent.plist
\tstate = spawn scheduled

\tprogram = /Applications/Example.app/Contents/MacOS/agent
\tdomain = gui/501 [100007]
\tminimum runtime = 60
\texit timeout = 5
\truns = 311
\tlast exit code = 0

\tjob state = exited
}
"""
# The line that replaces the exit code after a signal, on macOS 26.6:
# https://github.com/maoyadongsh/siq-agent-security/pull/66
KILLED = ("last terminating signal = Terminated: 15", "last terminating signal = Killed: 9")
# The lines of a job that could not be started because its log could not be created, on macOS 26.2:
# https://github.com/yasinBursali/DreamServer/issues/328
NOT_STARTED = ("state = spawn scheduled", "last exit code = 78: EX_CONFIG")
# `launchctl print-disabled gui/501`, on macOS 13 and later, and on older systems:
# https://github.com/DeterminateSystems/nix-installer/pull/555 and https://github.com/ninehills/blog/issues/85
DISABLED = '\n\tdisabled services = {\n\t\t"org.example.a" => enabled\n\t\t"org.example.b" => disabled\n\t}\n'
DISABLED_ONCE = 'disabled services = {\n\t"org.example.a" => false\n\t"org.example.b" => true\n}\n'
# Errors of launchctl, by action: exit code, standard error, and the address of the publication.
REFUSALS = {
    "print a job that is not loaded": (
        113,
        'Bad request.\nCould not find service "nope" in domain for user gui: 501\n',
        "https://github.com/sglavoie/dev-helpers/blob/e88273dd457ffb72100703f255f277dbcd9594fa/swift/heartbeat/Tests/HeartbeatCoreTests/LaunchctlFixtures.swift",
    ),
    # The first source has the error number, the second source has the text.
    "print a domain that does not exist": (
        112,
        "Bad request.\nCould not find domain for user gui: 99999\n",
        "https://github.com/lidge-jun/opencodex/issues/1770 https://github.com/Wamphyre/macOS_Silverback-Debloater/issues/2",
    ),
    "bootout a job that is not loaded": (
        3,
        "Boot-out failed: 3: No such process\n",
        "https://github.com/DeterminateSystems/nix-installer/issues/1148",
    ),
    "bootout a slow job": (
        36,
        "Boot-out failed: 36: Operation now in progress\n",
        "https://github.com/osquery/osquery/issues/5698",
    ),
    "bootstrap no property list": (
        5,
        "Bootstrap failed: 5: Input/output error\nTry re-running the command as root for richer errors.\n",
        "https://github.com/pirj/noclamshell/issues/25",
    ),
    # The first source has the cause and the error number, the second source has the text.
    "bootstrap what is loaded": (
        37,
        "Bootstrap failed: 37: Operation already in progress\n",
        "https://github.com/Homebrew/homebrew-services/issues/376 https://github.com/Homebrew/homebrew-core/issues/132781",
    ),
    "bootstrap what is disabled": (
        119,
        "Bootstrap failed: 119: Service is disabled\n",
        "https://github.com/DeterminateSystems/nix-installer/issues/530",
    ),
    # This is only the text from launchctl load, because no record of the error number was found.
    "bootstrap a file that others may write": (
        122,
        "Bootstrap failed: 122: Path had bad ownership/permissions\n",
        "https://github.com/munkireport/munkireport-php/issues/1468",
    ),
    "bootstrap into a domain that does not exist": (
        125,
        "Bootstrap failed: 125: Domain does not support specified action\n",
        "https://github.com/nix-community/home-manager/issues/4413",
    ),
}

KEEPS = 'trap "" HUP; exec sleep 1000'


def plist(name, script=KEEPS, **keys):
    """A property list of a job that writes its PID, as the role's jobs do, and runs a script."""
    values = {"Label": name, "ProgramArguments": ["/bin/sh", "-c", f'echo $$ >"$0"; {script}', f"{name}.pid"], **keys}
    return plistlib.dumps({"RunAtLoad": True, "KeepAlive": True, "ExitTimeOut": 5, **values}).decode()


class Mac:
    """A folder for property lists, the stand-in of launchd, and the module, run as Ansible runs it."""

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
            launchd_jobs.main()
        return json.loads(self.capsys.readouterr().out)


@pytest.fixture
def mac(tmp_path, capsys, monkeypatch):
    # On a Mac, Apple's plutil is used.
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


def test_jobs_are_loaded_and_a_second_run_changes_nothing(mac):
    listed = (mac.job("a"), mac.job("b"))
    result = mac.run(*listed)
    assert (result["changed"], result["started"]) == (True, ["a", "b"])
    before = [mac.pid("a"), mac.pid("b")]
    assert all(before)
    result = mac.run(*listed)
    assert (result["changed"], result["diff"]) == (False, [])
    assert [mac.pid("a"), mac.pid("b")] == before


def test_only_a_changed_property_list_is_reloaded(mac):
    mac.run(mac.job("a"), mac.job("b"))
    before = mac.pid("a")
    result = mac.run(mac.job("a"), mac.job("b", ExitTimeOut=7))
    assert (result["restarted"], result["started"]) == (["b"], [])
    assert mac.state("b")["exit timeout"] == "7"
    assert mac.pid("a") == before
    assert [diff["before_header"] for diff in result["diff"]] == [str(mac.agents / "b.plist")]


def test_only_the_owner_may_write_a_property_list_under_any_umask(mac):
    before = os.umask(0)
    try:
        assert not mac.run(mac.job("a")).get("failed")
        assert mac.agents.joinpath("a.plist").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_next_run_completes_one_that_was_killed_before_the_load(mac):
    """The killed run booted out the job, and may have written the file."""
    mac.run(mac.job("a"))
    mac.call("bootout", f"{mac.domain}/a")
    result = mac.run(mac.job("a"))
    assert (result["changed"], result["started"], result["diff"]) == (True, ["a"], [])
    assert mac.pid("a")


def test_changed_job_is_booted_out_before_its_file_is_written(mac, monkeypatch):
    mac.run(mac.job("a"))
    seen = []
    write = ManagedFiles.write
    monkeypatch.setattr(ManagedFiles, "write", lambda self, *words: seen.append(mac.state("a")) or write(self, *words))
    mac.run(mac.job("a", ExitTimeOut=7))
    assert seen == [None]


@pytest.mark.parametrize("code", [5, 37])
def test_load_that_is_refused_just_after_the_boot_out_is_retried(mac, code):
    """macOS 26.5 refuses the load with 5 or 37 for about five seconds: https://github.com/headroomlabs-ai/headroom/issues/1289"""
    mac.run(mac.job("a"))
    refusing = f"""
import pathlib, sys
tries = pathlib.Path({str(mac.home / "tries")!r})
if sys.argv[1] == "bootstrap" and len(tries.read_text()) < 2:
    tries.write_text(tries.read_text() + ".")
    sys.exit({code})
"""
    (mac.home / "tries").touch()
    executable(mac.home / "bin/launchctl", refusing + (STAND_IN / "bin/launchctl").read_text())
    assert mac.run(mac.job("a", ExitTimeOut=7))["restarted"] == ["a"]
    assert (mac.home / "tries").read_text() == ".."
    assert mac.state("a")["exit timeout"] == "7"


def test_newer_file_in_restart_on_causes_a_restart(mac, tmp_path):
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


def test_process_without_a_record_of_its_start_is_restarted(mac, tmp_path):
    listed = mac.job("a", restart_on=[tmp_path])
    mac.run(listed)
    (tmp_path / "a.pid").write_text("1\n")
    # The folder is older than the record.
    os.utime(tmp_path, (0, 0))
    assert mac.run(listed)["restarted"] == ["a"]


def test_only_unlisted_jobs_of_the_owner_are_removed(mac):
    mac.run(mac.job("a"), mac.job("gone"))
    mac.run(mac.job("theirs"), owner="app/celery")
    result = mac.run(mac.job("a"))
    assert result["removed"] == ["gone"]
    assert mac.state("gone") is None
    assert sorted(path.stem for path in mac.agents.iterdir()) == ["a", "theirs"]
    assert mac.pid("theirs")


def test_check_mode_reports_and_changes_nothing(mac):
    mac.run(mac.job("a"), mac.job("gone"))
    before = [mac.pid("a"), mac.pid("gone")]
    result = mac.run(mac.job("a", ExitTimeOut=7), mac.job("new"), check=True)
    assert result["changed"]
    assert (result["removed"], result["restarted"], result["started"]) == (["gone"], ["a"], ["new"])
    assert len(result["diff"]) == 3
    assert [mac.pid("a"), mac.pid("gone")] == before
    assert mac.state("new") is None
    assert sorted(path.stem for path in mac.agents.iterdir()) == ["a", "gone"]


def test_job_that_does_not_stay_up_fails_with_its_log_until_it_is_repaired(mac, tmp_path):
    log = str(tmp_path / "a.log")
    dying = mac.job("a", "sleep 0.2; echo last words >&2; exit 3", settle=1, StandardErrorPath=log, ThrottleInterval=60)
    result = mac.run(dying)
    assert result["failed"]
    for words in ("a was started but did not keep running: it is spawn scheduled (exit code 3)", f"log of a, {log}:\nlast words"):
        assert words in result["msg"]
    # The next run detects that the job is not running, and retries.
    assert mac.run(dying)["failed"]
    result = mac.run(mac.job("a", StandardErrorPath=log, ThrottleInterval=60))
    assert not result.get("failed"), result
    assert mac.pid("a")


def test_loaded_job_that_is_not_running_is_started(mac):
    listed = mac.job("a", ThrottleInterval=60)
    mac.run(listed)
    os.kill(mac.pid("a"), 9)
    until(lambda: mac.pid("a") is None)
    result = mac.run(listed)
    assert (result["changed"], result["started"]) == (True, ["a"])
    assert mac.pid("a")


def test_job_without_keepalive_need_not_run(mac):
    listed = mac.job("a", "true", KeepAlive=False, RunAtLoad=False, StartInterval=3600)
    assert mac.run(listed)["started"] == ["a"]
    assert mac.state("a")["runs"] == "0"
    assert not mac.run(listed)["changed"]


def test_manually_disabled_job_is_enabled(mac):
    mac.run(mac.job("a"))
    mac.call("bootout", f"{mac.domain}/a")
    mac.call("disable", f"{mac.domain}/a")
    assert mac.run(mac.job("a"))["started"] == ["a"]
    assert mac.pid("a")
    assert not mac.run(mac.job("a"))["changed"]


def test_module_waits_for_a_slow_stop(mac, tmp_path):
    """The job takes longer to stop than launchctl waits."""
    slow = mac.job("a", "trap 'sleep 2; echo done >finished; exit' TERM; while :; do sleep 0.1; done", ExitTimeOut=20)
    mac.run(slow)
    assert mac.run()["removed"] == ["a"]
    assert (tmp_path / "finished").exists()
    assert mac.state("a") is None


def test_invalid_property_list_is_an_error_before_any_change(mac):
    mac.run(mac.job("a"))
    before = mac.pid("a")
    for content, words in (("<plist><dict>", "is not a property list"), (plist("other"), "has the label 'other'")):
        result = mac.run({**mac.job("b"), "content": content})
        assert result["failed"]
        assert words in result["msg"]
    assert mac.pid("a") == before


def test_property_list_that_plutil_rejects_is_not_loaded(mac):
    executable(mac.home / "bin/plutil", "import sys; sys.exit('<stdin>: Unexpected character' if '-lint' in sys.argv else 0)")
    result = mac.run(mac.job("a"))
    assert "plutil rejects" in result["msg"]
    assert "Unexpected character" in result["msg"]
    assert list(mac.agents.iterdir()) == []


def test_owners_with_two_hyphens_are_distinguished(mac):
    mac.run(mac.job("a"), owner="my--app/web")
    assert plistlib.loads(mac.agents.joinpath("a.plist").read_bytes())["Label"] == "a"
    assert mac.run(owner="my--app/celery")["removed"] == []
    assert mac.run(owner="my--app/web")["removed"] == ["a"]


def test_host_without_launchd_is_an_error(mac, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "no launchctl" in mac.run(mac.job("a"))["msg"]


# Parsing of launchctl's output


def test_records_of_jobs_are_parsed():
    running, waiting, between = (jobs.parse_print(record) for record in (RUNNING, WAITING, BETWEEN))
    assert (jobs.process(running), jobs.runs(running), running["state"], running["exit timeout"]) == (1076, 1, "running", "5")
    assert (jobs.process(waiting), jobs.runs(waiting), waiting["state"]) == (None, 311, "spawn scheduled")
    assert (jobs.process(between), jobs.runs(between), between["state"]) == (None, 18, "not running")
    assert running["last exit code"] == "(never exited)"
    assert "ID" not in running, "the ID is the coalition's"


def test_records_of_disabled_jobs_are_parsed():
    assert jobs.parse_disabled(DISABLED) == jobs.parse_disabled(DISABLED_ONCE) == ["org.example.b"]


# The launchd stand-in compared with recorded output of launchctl


def shape(line):
    """A line without job-specific values."""
    return re.sub(r" = .*", "", line) if " = " in line and not line.endswith("{") else line


def printed(mac, label):
    """The stand-in's output about a job, with the domain of the user 501."""
    return mac.call("print", f"{mac.domain}/{label}").stdout.replace(mac.domain, "gui/501").splitlines()


def in_order(lines, record):
    """Whether a record contains the lines' shapes in the same order."""
    rest = iter([shape(line) for line in record.splitlines() if line])
    return all(shape(line) in rest for line in lines if line)


def test_stand_in_prints_a_running_job(mac):
    mac.run(mac.job("org.example.kept"))
    lines = printed(mac, "org.example.kept")
    assert in_order(lines, RUNNING), lines
    assert lines[0] == RUNNING.splitlines()[0]
    same = {"\tstate = running", "\truns = 1", "\tactive count = 1", "\ttype = LaunchAgent", "\tlast exit code = (never exited)"}
    assert same <= set(lines) & set(RUNNING.splitlines())


def test_stand_in_prints_a_job_between_two_runs(mac):
    mac.run(mac.job("org.example.hourly", "true", KeepAlive=False, StartInterval=900))
    until(lambda: mac.state("org.example.hourly").get("last exit code") == "0")
    lines = printed(mac, "org.example.hourly")
    assert in_order(lines, BETWEEN), lines
    assert {"\tstate = not running", "\tactive count = 0", "\tlast exit code = 0"} <= set(lines) & set(BETWEEN.splitlines())


@pytest.mark.parametrize(("number", "recorded"), [(15, KILLED[0]), (9, KILLED[1])])
def test_stand_in_prints_a_waiting_job(mac, number, recorded):
    mac.run(mac.job("org.example.agent", ThrottleInterval=60))
    os.kill(mac.pid("org.example.agent"), number)
    until(lambda: mac.pid("org.example.agent") is None)
    lines = printed(mac, "org.example.agent")
    assert f"\t{recorded}" in lines
    assert {"\tstate = spawn scheduled", "\tactive count = 0"} <= set(lines) & set(WAITING.splitlines())
    # The record has neither type nor coalition.
    lines = [line for line in lines[: lines.index("\tresource coalition = {")] if shape(line) != "\ttype"]
    assert in_order(lines[:-2], WAITING), lines


def test_stand_in_prints_a_job_that_could_not_be_started(mac, tmp_path):
    missing = str(tmp_path / "missing/a.log")
    assert mac.run(mac.job("a", StandardOutPath=missing, ThrottleInterval=60))["failed"]
    assert {f"\t{line}" for line in NOT_STARTED} <= set(printed(mac, "a"))


def test_stand_in_has_the_errors_of_the_records(mac, tmp_path):
    """Compares strings and numbers."""
    done = {}
    done["print a job that is not loaded"] = mac.call("print", f"{mac.domain}/nope")
    done["print a domain that does not exist"] = mac.call("print", "gui/99999")
    done["bootout a job that is not loaded"] = mac.call("bootout", f"{mac.domain}/nope")
    done["bootstrap no property list"] = mac.call("bootstrap", mac.domain, mac.write("bad", "no plist"))
    done["bootstrap a file that others may write"] = mac.call("bootstrap", mac.domain, mac.write("open", plist("open"), 0o666))
    slow = "trap 'sleep 2; exit' TERM; : >ready; while :; do sleep 0.1; done"
    good = mac.write("good", plist("good", slow, WorkingDirectory=str(mac.home), ExitTimeOut=20))
    done["bootstrap into a domain that does not exist"] = mac.call("bootstrap", "gui/99999", good)
    assert mac.call("bootstrap", mac.domain, good).returncode == 0
    done["bootstrap what is loaded"] = mac.call("bootstrap", mac.domain, good)
    until((tmp_path / "ready").exists)
    done["bootout a slow job"] = mac.call("bootout", f"{mac.domain}/good")
    until(lambda: mac.state("good") is None)
    mac.call("disable", f"{mac.domain}/good")
    done["bootstrap what is disabled"] = mac.call("bootstrap", mac.domain, good)
    said = {case: (end.returncode, end.stderr.replace(f"gui: {os.geteuid()}\n", "gui: 501\n")) for case, end in done.items()}
    assert said == {case: (code, words) for case, (code, words, _) in REFUSALS.items()}


def test_stand_in_rejects_a_property_list_without_program_or_label(mac):
    """launchd.plist(5): Label is required, and ProgramArguments in the absence of Program, which these jobs do not have."""
    for values in ({"Label": "empty"}, {"ProgramArguments": ["/bin/true"]}):
        assert mac.call("bootstrap", mac.domain, mac.write("empty", plistlib.dumps(values).decode())).returncode == 5


def test_stand_in_kills_a_job_after_its_timeout_and_the_rest_of_its_group(mac, tmp_path):
    deaf = 'sleep 1001 & echo $! >child; trap "" TERM; while :; do sleep 0.1; done'
    mac.run(mac.job("a", deaf, ExitTimeOut=1))
    child = int((tmp_path / "child").read_text())
    done = mac.call("bootout", f"{mac.domain}/a")
    assert (done.returncode, done.stderr) == (36, "Boot-out failed: 36: Operation now in progress\n")
    until(lambda: mac.state("a") is None)
    # If no parent waits for the process, it stays a zombie.
    until(lambda: subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True).stdout[:1] in (b"", b"Z"))


def test_stand_in_loads_the_users_agents_at_login(mac, capsys):
    mac.run(mac.job("a"))
    before = mac.pid("a")
    mac.launchd.kill()
    mac.launchd.wait()
    os.kill(before, 9)
    (mac.home / "socket").unlink()
    mac.launchd = subprocess.Popen([sys.executable, "-S", STAND_IN / "libexec/launchd"], env={**os.environ, "HOME": str(mac.home)})
    until(lambda: (mac.home / "socket").exists())
    assert mac.pid("a") not in (None, before)
