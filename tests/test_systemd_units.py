"""Tests the module systemd_units with a fake systemctl that stores its state in a file."""

from __future__ import annotations

import json
import os
import time

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils import systemd
from ansible_collections.django_celery.stack.plugins.modules import systemd_units
from helpers import executable

# Imitates the parts of systemctl that the module uses: a unit exists if it has a file, a start has a monotonic time, a unit whose
# file is newer than the last daemon-reload needs one, and a socket can't be restarted while its service runs.
SYSTEMCTL = r"""
import json, os, sys, time
directory, state_file = os.environ["FAKE_UNITS"], os.environ["FAKE_STATE"]
with open(state_file) as file:
    state = json.load(file)
verb, words = sys.argv[2], sys.argv[3:]
names = words[words.index("--") + 1:] if "--" in words else []
state["calls"].append(" ".join([verb, *[w for w in words if w == "--now"], *names]))

def unit(name):
    return state["units"].setdefault(name, {"enabled": False, "active": "inactive", "since": 0, "restarts": 0})

def path(name):
    return os.path.join(directory, name)

if verb == "show":
    for name in names:
        known = os.path.exists(path(name)) or name in state["packages"]
        if name in state["revived"] and unit(name)["active"] == "active":
            # Dies and is restarted before the next query.
            unit(name)["restarts"] += 1
        if name in state["mortal"] and unit(name)["active"] == "active":
            # Dies between its start and the next query; systemd restarts it.
            unit(name).update(active="activating", restarts=1)
        print("Id=" + name)
        print("ActiveState=" + unit(name)["active"])
        print("SubState=auto-restart\nResult=exit-code")
        print("LoadState=" + ("loaded" if known else "not-found"))
        print("UnitFileState=" + (("enabled" if unit(name)["enabled"] else "disabled") if known else ""))
        stale = os.path.exists(path(name)) and os.stat(path(name)).st_mtime > state["reloaded"]
        print("NeedDaemonReload=" + ("yes" if stale else "no"))
        print("NRestarts=%d" % unit(name)["restarts"])
        print("ReloadResult=" + unit(name).get("reload", "success"))
        print("StateChangeTimestampMonotonic=%d" % unit(name).get("changed", unit(name)["since"]))
        print("ExecMainStartTimestampMonotonic=%d\n" % unit(name)["since"])
elif verb == "reload":
    for name in names:
        failed = name in state["refusing"]
        unit(name).update(changed=int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6), reload="exit-code" if failed else "success")
        if failed:
            with open(state_file, "w") as file:
                json.dump(state, file)
            sys.exit("Job for %s failed." % name)
elif verb == "daemon-reload":
    state["reloaded"] = time.time()
elif verb in ("enable", "disable"):
    for name in names:
        unit(name)["enabled"] = verb == "enable"
        if "--now" in words:
            unit(name).update(active="inactive", since=0)
elif verb == "stop":
    for name in names:
        unit(name).update(active="inactive", since=0)
elif verb == "reset-failed":
    for name in names:
        unit(name)["restarts"] = 0
    state["limited"] = [name for name in state["limited"] if name not in names]
elif verb in ("start", "restart"):
    for name in names:
        if name in state["limited"]:
            with open(state_file, "w") as file:
                json.dump(state, file)
            sys.exit("Failed to start %s: start of the service was attempted too often" % name)
        fed = name.replace(".socket", ".service")
        if fed != name and verb == "restart" and unit(fed)["active"] == "active":
            sys.exit("Socket service %s already active, refusing." % fed)
    for name in names:
        if verb == "start" and unit(name)["active"] == "active":
            continue
        # A start while systemd waits to restart the unit counts as a restart.
        restarts = unit(name)["restarts"] + int(verb == "start" and unit(name)["active"] == "activating")
        unit(name).update(active="active", since=int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6), restarts=restarts)
with open(state_file, "w") as file:
    json.dump(state, file)
"""

ACTS = ("start", "restart", "reload", "stop", "enable", "disable")


class Host:
    """A fake host: a directory for unit files and the state of the fake systemctl. `run` calls the module as Ansible does."""

    def __init__(self, folder, capsys):
        self.directory, self.state_file, self.capsys = folder / "units", folder / "state.json", capsys
        self.directory.mkdir()
        self.state = {
            "units": {},
            "calls": [],
            "mortal": [],
            "revived": [],
            "limited": [],
            "packages": [],
            "reloaded": 0,
            "refusing": [],
        }

    @property
    def state(self):
        return json.loads(self.state_file.read_text())

    @state.setter
    def state(self, state):
        self.state_file.write_text(json.dumps(state))

    def calls(self, *verbs):
        """The calls of systemctl since the start of the last run, without queries."""
        return [call for call in self.state["calls"] if call.split()[0] in (verbs or ACTS)]

    def run(self, *listed, owner="app/web", check=False):
        self.state = {**self.state, "calls": []}
        arguments = {"owner": owner, "units": list(listed), "directory": str(self.directory), "_ansible_check_mode": check}
        with patch_module_args(arguments), pytest.raises(SystemExit):
            systemd_units.main()
        return json.loads(self.capsys.readouterr().out)

    def age(self, name, seconds):
        """Moves the unit's start and its file's time back by the given number of seconds."""
        state = self.state
        state["units"][name]["since"] -= int(seconds * 1e6)
        self.state = state
        then = time.time() - seconds - 1
        os.utime(self.directory / name, (then, then))


@pytest.fixture
def host(tmp_path, monkeypatch, capsys):
    executable(tmp_path / "bin/systemctl", SYSTEMCTL)
    executable(tmp_path / "bin/journalctl", "import sys; print('last words of', sys.argv[-1])")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_UNITS", str(tmp_path / "units"))
    monkeypatch.setenv("FAKE_STATE", str(tmp_path / "state.json"))
    return Host(tmp_path, capsys)


def service(name, text="[Service]\n", **options):
    return {"name": f"{name}.service", "content": text, **options}


# Pure functions


def test_show_output_is_parsed_per_unit():
    text = "Id=a.service\nActiveState=active\nResult=a=b\n\nId=b.service\nActiveState=failed\n\nActiveState=x\n"
    assert systemd.parse_show(text) == {
        "a.service": {"Id": "a.service", "ActiveState": "active", "Result": "a=b"},
        "b.service": {"Id": "b.service", "ActiveState": "failed"},
    }


def test_packaged_unit_gets_a_drop_in():
    assert systemd.target_path("/d", {"name": "a.service", "packaged": False}) == "/d/a.service"
    assert systemd.target_path("/d", {"name": "a.service", "packaged": True}) == "/d/a.service.d/50-ansible.conf"


@pytest.mark.parametrize("stamp", ["ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic"])
def test_unit_is_stale_when_a_file_is_newer_than_its_start(tmp_path, stamp):
    file = tmp_path / "file"
    file.write_text("")
    running = {stamp: str(int((time.clock_gettime(time.CLOCK_MONOTONIC) - 0.0) * 1e6))}
    for seconds, stale in ((-60, False), (60, True)):
        os.utime(file, (time.time() + seconds,) * 2)
        assert systemd.is_stale(running, [str(file)]) is stale
    assert systemd.is_stale({stamp: "0"}, [str(file)]) is False


# The module


def test_units_are_written_enabled_and_started_and_a_second_run_changes_nothing(host):
    first = host.run(service("a"), service("b"))
    assert first["changed"]
    assert first["started"] == ["a.service", "b.service"]
    assert (host.directory / "a.service").read_text() == "# Managed by Ansible for app/web\n[Service]\n"
    assert (host.directory / "a.service").stat().st_mode & 0o777 == 0o644
    assert host.calls() == ["enable a.service b.service", "start a.service b.service"]
    second = host.run(service("a"), service("b"))
    assert not second["changed"]
    assert host.calls("daemon-reload", *ACTS) == []


def test_unchanged_run_calls_systemctl_once(host):
    host.run(service("a"), service("b"))
    for check in (False, True):
        assert not host.run(service("a"), service("b"), check=check)["changed"]
        assert host.state["calls"] == ["show a.service b.service"]


def test_run_without_units_does_not_call_systemctl(host):
    assert not host.run()["changed"]
    assert host.state["calls"] == []


def test_all_units_are_started_with_one_call(host):
    host.run(service("a"), service("b"), service("c"))
    assert host.calls("start") == ["start a.service b.service c.service"]


def test_files_are_readable_under_any_umask(host):
    before = os.umask(0o077)
    try:
        host.run(service("a"))
        host.run(service("a", "[Service]\nNice=1\n"))
        host.run({"name": "b.service", "content": "[Service]\n", "packaged": True}, service("a", "[Service]\nNice=1\n"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in host.directory.rglob("*")}
    assert modes == {"a.service": 0o644, "b.service.d": 0o755, "50-ansible.conf": 0o644}


def test_changed_target_is_written_without_restarts(host):
    target = {"name": "app.target", "content": "[Unit]\n"}
    host.run(target, service("a"))
    host.age("a.service", 60)
    host.age("app.target", 60)
    changed = {**target, "content": "[Unit]\nDescription=The app\n"}
    result = host.run(changed, service("a"))
    assert (result["changed"], result["started"], result["restarted"]) == (True, [], [])
    assert host.calls("daemon-reload", *ACTS) == ["daemon-reload"]
    assert "Description" in (host.directory / "app.target").read_text()
    assert not host.run(changed, service("a"))["changed"]


def test_start_limit_is_reset_before_a_start(host):
    host.run(service("a"))
    state = host.state
    state["units"]["a.service"].update(active="failed", restarts=5)
    host.state = {**state, "limited": ["a.service"]}
    result = host.run(service("a"))
    assert not result.get("failed"), result
    assert host.calls("reset-failed", "start") == ["reset-failed a.service", "start a.service"]


def test_failed_start_reports_the_journals_of_failed_units(host, tmp_path):
    refusing = SYSTEMCTL.replace(
        'if verb == "show":', 'if verb == "start":\n    sys.exit("Job for a.service failed.")\nif verb == "show":'
    )
    executable(tmp_path / "bin/systemctl", refusing)
    result = host.run(service("a"))
    assert result["failed"]
    assert "Job for a.service failed." in result["msg"]
    assert "The end of the journal of a.service:\nlast words of a.service" in result["msg"]
    assert result["changed"]


@pytest.mark.parametrize(
    "line",
    [
        "OSError: [Errno 98] Address already in use",
        "app.socket: Failed to create listening socket (127.0.0.1:8000): Address already in use",
        "Failed to start Ranch listener in ranch_tcp:listen([]) for reason eaddrinuse (address already in use)",
    ],
)
def test_start_that_fails_for_a_port_in_use_shows_the_listeners(host, tmp_path, line):
    executable(tmp_path / "bin/journalctl", f"print({line!r})")
    ss = "import sys\nassert '--processes' in sys.argv\nprint('127.0.0.1:8000 users:((\"other\",pid=7))')"
    executable(tmp_path / "bin/ss", ss)
    host.state = {**host.state, "mortal": ["a.service"]}
    message = host.run(service("a", settle=0.2))["msg"]
    assert "An address that a.service listens on is in use by another program." in message
    assert 'users:(("other",pid=7))' in message
    assert line in message


def test_unit_that_systemd_had_to_restart_is_an_error(host):
    host.state = {**host.state, "revived": ["a.service"]}
    # The module sends the first query before the start.
    result = host.run(service("a", settle=0.2))
    assert result["failed"]
    assert "a.service was started but did not keep running: it is active" in result["msg"]


def test_changed_content_restarts_only_that_unit(host):
    host.run(service("a"), service("b"))
    result = host.run(service("a"), service("b", "[Service]\nNice=1\n"))
    assert result["restarted"] == ["b.service"]
    assert host.calls("daemon-reload", "restart") == ["daemon-reload", "restart b.service"]
    assert [(d["before_header"], d["after"].splitlines()[-1]) for d in result["diff"]] == [
        (str(host.directory / "b.service"), "Nice=1")
    ]


def test_next_run_completes_one_that_was_killed_before_the_restart(host):
    host.run(service("a"))
    host.age("a.service", 60)
    # The killed run wrote the file. Only the file's time shows this.
    os.utime(host.directory / "a.service")
    result = host.run(service("a"))
    assert result["restarted"] == ["a.service"]
    assert host.calls("daemon-reload", "restart") == ["daemon-reload", "restart a.service"]
    assert not host.run(service("a"))["changed"]


def test_newer_file_in_restart_on_causes_a_restart(host, tmp_path):
    release = tmp_path / "current"
    release.symlink_to("releases/1")
    host.run(service("a", restart_on=[str(release)]), service("b"))
    host.age("a.service", 60)
    host.age("b.service", 60)
    assert host.run(service("a", restart_on=[str(release)]), service("b"))["restarted"] == ["a.service"]


def web(text="[Service]\n"):
    standby = {"name": "web-standby.service", "content": text, "standby_of": "web.service"}
    return {"name": "web.socket", "content": "[Socket]\n"}, service("web", text), standby


def test_standby_runs_only_while_its_unit_restarts(host):
    first = host.run(*web())
    assert first["started"] == ["web.socket", "web.service"]
    assert host.calls("start", "restart") == ["start web.socket web.service"]
    result = host.run(*web("[Service]\nNice=1\n"))
    assert result["restarted"] == ["web.service"]
    assert host.calls() == ["restart web-standby.service", "restart web.service", "stop web-standby.service"]
    assert not host.run(*web("[Service]\nNice=1\n"))["changed"]


def test_unit_keeps_running_if_its_standby_does_not_start(host):
    host.run(*web())
    host.state = {**host.state, "limited": ["web-standby.service"]}
    result = host.run(*web("[Service]\nNice=1\n"))
    assert result["failed"]
    assert "last words of web-standby.service" in result["msg"]
    assert host.calls("restart") == ["restart web-standby.service"]
    assert host.state["units"]["web.service"]["active"] == "active"


def test_standby_stops_if_its_unit_does_not_restart(host):
    host.run(*web())
    host.state = {**host.state, "revived": ["web.service"]}
    listed = list(web("[Service]\nNice=1\n"))
    listed[1]["settle"] = 0.2
    assert host.run(*listed)["failed"]
    assert host.calls()[-1] == "stop web-standby.service"


def test_standby_of_a_killed_run_is_stopped(host):
    host.run(*web())
    state = host.state
    state["units"]["web-standby.service"]["active"] = "active"
    host.state = state
    assert host.run(*web(), check=True)["changed"]
    assert host.calls() == []
    assert host.run(*web())["changed"]
    assert host.calls() == ["stop web-standby.service"]
    assert not host.run(*web())["changed"]


def test_socket_that_restarts_needs_no_standby(host):
    socket, *others = web()
    host.run(socket, *others)
    result = host.run({**socket, "content": "[Socket]\nListenStream=1\n"}, *others)
    assert not result.get("failed"), result
    assert host.calls() == ["stop web.service", "restart web.socket web.service"]


def proxy(settings):
    return {"name": "proxy.service", "content": "[Service]\n", "packaged": True, "reload_on": [str(settings)]}


@pytest.fixture
def settings(host, tmp_path):
    """The settings file of a proxy that has run for a minute."""
    file = tmp_path / "settings"
    file.write_text("")
    host.state = {**host.state, "packages": ["proxy.service"]}
    host.run(proxy(file))
    state = host.state
    state["units"]["proxy.service"]["since"] -= int(60e6)
    host.state = state
    for path in (file, host.directory / "proxy.service.d/50-ansible.conf"):
        os.utime(path, (time.time() - 90,) * 2)
    return file


def test_newer_file_in_reload_on_causes_a_reload(host, settings):
    assert not host.run(proxy(settings))["changed"]
    os.utime(settings)
    result = host.run(proxy(settings), check=True)
    assert (result["changed"], result["reloaded"], host.calls()) == (True, ["proxy.service"], [])
    result = host.run(proxy(settings))
    assert (result["changed"], result["reloaded"], result["restarted"]) == (True, ["proxy.service"], [])
    assert host.calls() == ["reload proxy.service"]
    assert not host.run(proxy(settings))["changed"]


def test_failed_reload_is_repeated_by_the_next_run(host, settings):
    os.utime(settings)
    host.state = {**host.state, "refusing": ["proxy.service"]}
    result = host.run(proxy(settings))
    assert result["failed"]
    assert "last words of proxy.service" in result["msg"]
    host.state = {**host.state, "refusing": []}
    assert host.run(proxy(settings))["reloaded"] == ["proxy.service"]
    assert not host.run(proxy(settings))["changed"]


def test_started_or_restarted_unit_is_not_reloaded(host, settings):
    os.utime(settings)
    result = host.run({**proxy(settings), "content": "[Service]\nNice=1\n"})
    assert (result["restarted"], result["reloaded"]) == (["proxy.service"], [])
    assert host.calls() == ["restart proxy.service"]


def test_manually_stopped_or_disabled_units_are_repaired(host):
    host.run(service("a"))
    state = host.state
    state["units"]["a.service"] = {"enabled": False, "active": "failed", "since": 0, "restarts": 0}
    host.state = state
    result = host.run(service("a"))
    assert result["started"] == ["a.service"]
    assert host.calls() == ["enable a.service", "start a.service"]


def test_check_mode_reports_a_disabled_unit_and_does_not_enable_it(host):
    host.run(service("a"))
    state = host.state
    state["units"]["a.service"]["enabled"] = False
    host.state = state
    assert host.run(service("a"), check=True)["changed"]
    assert host.calls() == []


def test_only_unlisted_units_of_the_owner_are_removed(host):
    target = {"name": "app.target", "content": "[Unit]\n", "shared": True}
    host.run(target, service("a"), service("gone"))
    host.run(target, service("theirs"), owner="app/celery")
    result = host.run(target, service("a"))
    assert result["removed"] == ["gone.service"]
    assert host.calls() == ["disable --now gone.service"]
    assert sorted(path.name for path in host.directory.iterdir()) == ["a.service", "app.target", "theirs.service"]
    assert host.run(owner="app/web")["removed"] == ["a.service"]
    assert (host.directory / "app.target").exists()


def test_check_mode_reports_and_changes_nothing(host):
    host.run(service("a"), service("gone"))
    before = host.state["units"]
    result = host.run(service("a", "[Service]\nNice=1\n"), service("new"), check=True)
    assert result["changed"]
    assert result["removed"] == ["gone.service"]
    assert result["started"] == ["new.service"]
    assert {os.path.basename(d["after_header"]): bool(d["after"]) for d in result["diff"]} == {
        "gone.service": False,
        "a.service": True,
        "new.service": True,
    }
    assert host.calls("daemon-reload", "reset-failed", *ACTS) == []
    assert host.state["units"].items() >= before.items()
    assert sorted(path.name for path in host.directory.iterdir()) == ["a.service", "gone.service"]
    assert "Nice" not in (host.directory / "a.service").read_text()


def test_check_mode_allows_for_a_package_that_is_not_installed_yet(host):
    packaged = {"name": "broker.service", "content": None, "packaged": True}
    assert host.run(packaged, check=True)["changed"]
    host.state = {**host.state, "packages": ["broker.service"]}
    host.run(packaged)
    assert not host.run(packaged, check=True)["changed"]


def test_drop_in_of_a_packaged_unit(host):
    host.state = {**host.state, "packages": ["broker.service"]}
    result = host.run({"name": "broker.service", "content": "[Service]\nNice=1\n", "packaged": True})
    assert result["started"] == ["broker.service"]
    assert [path.name for path in host.directory.iterdir()] == ["broker.service.d"]
    # An unlisted drop-in is removed; the package's unit is neither stopped nor disabled.
    result = host.run({"name": "broker.service", "content": None, "packaged": True})
    assert result["removed"] == ["50-ansible.conf"]
    assert host.calls("disable", "stop") == []


def test_unit_that_does_not_stay_up_fails_with_its_journal(host):
    host.state = {**host.state, "mortal": ["a.service"]}
    result = host.run(service("a", settle=0.2))
    assert result["failed"]
    for words in ("a.service was started but did not keep running", "activating", "exit-code", "last words of a.service"):
        assert words in result["msg"]
    # The next run detects that the unit is not running, and retries.
    assert host.run(service("a", settle=0.2))["failed"]


def test_failing_unit_runs_after_its_repair(host):
    host.state = {**host.state, "mortal": ["a.service"]}
    assert host.run(service("a", settle=0.2))["failed"]
    host.state = {**host.state, "mortal": []}
    result = host.run(service("a", "[Service]\nNice=1\n", settle=0.2), service("b"))
    assert not result.get("failed"), result
    assert result["started"] == ["a.service", "b.service"]
    assert host.calls() == ["enable b.service", "restart a.service", "start b.service"]


def test_socket_is_restarted_with_its_service(host):
    socket = {"name": "a.socket", "content": "[Socket]\nListenStream=8000\n"}
    host.run(socket, service("a"))
    moved = {**socket, "content": "[Socket]\nListenStream=8001\n"}
    result = host.run(moved, service("a"))
    assert not result.get("failed"), result
    assert "a.socket" in result["restarted"]
    assert host.calls()[0] == "stop a.service"
    assert {name: unit["active"] for name, unit in host.state["units"].items()} == {"a.socket": "active", "a.service": "active"}


def test_host_without_systemd_is_an_error(host, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    result = host.run(service("a"))
    assert result["failed"]
    assert "no systemctl" in result["msg"]


def test_unit_on_demand_is_written_and_neither_started_nor_restarted(host):
    timer = {"name": "a.timer", "content": "[Timer]\n"}
    result = host.run(service("a", on_demand=True), timer)
    assert (result["changed"], result["started"]) == (True, ["a.timer"])
    assert (host.directory / "a.service").exists()
    result = host.run(service("a", "[Service]\nNice=1\n", on_demand=True), timer)
    assert (result["changed"], result["started"], result["restarted"]) == (True, [], [])
    assert host.calls("daemon-reload", "start", "restart") == ["daemon-reload"]
    assert host.run(service("a", "[Service]\nNice=1\n", on_demand=True), timer)["changed"] is False
