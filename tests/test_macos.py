"""Tests the roles' values on a Mac: property lists of agents and daemons, paths, and which of Homebrew's releases are accepted."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import subprocess
import time

import pytest
import yaml
from helpers import MARK, ROOT, common_variables, executable, playbook

PREFIX = "/Users/me/.local"
FACTS = {
    "agents": {"architecture": "arm64", "effective_user_id": 501, "user_id": "me", "user_dir": "/Users/me"},
    "daemons": {"architecture": "x86_64", "effective_user_id": 0, "user_id": "root", "user_dir": "/var/root"},
}
WIRED = {
    "service_address": "localhost",
    "wiring_tls": False,
    "rabbitmq_listeners": ["127.0.0.1:5672"],
    "app_broker_url": f"amqp://{MARK}",
    "flower_broker_url": f"amqp://{MARK}",
    "flower_broker_api": "",
    "django_migrate": True,
    "django_web": True,
    "celery_beat": True,
    "celery_workers": [{"name": "slow", "queues": ["a", "b"], "time_limit": 900}],
    "django_web_listen": ["[::1]:8001", "/run/other.sock"],
    "rabbitmq_version": "4.2",
    "erlang_version": "27",
    "host_homebrew_user": "brewer",
    "postgresql_listen_addresses": ["localhost"],
    "rabbitmq_nodes": [],
    "rabbitmq_distribution_address": "127.0.0.1",
    "host_prefix": "{{ (ansible_facts['effective_user_id'] == 0) | ternary('', '/Users/me/.local') }}",
}
ROLES = ("rabbitmq", "postgresql", "django", "celery", "flower")
# For each case: the version that Homebrew would install, the installed versions and the Erlang version, then the expected level and
# error.
FORMULAE = {
    "supported": ("4.2.10", [], "27", "supported", ""),
    "installed": ("4.3.5", ["4.2.10_1"], "27", "supported", ""),
    "paired": ("4.2.10", [], "28", "paired", ""),
    "refused": ("4.2.10", [], "29", "refused", "RabbitMQ 4.2.10 of Homebrew does not run on Erlang 29"),
    "another series": ("4.3.5", [], "27", "supported", "rabbitmq_version is '4.2', and Homebrew has only RabbitMQ 4.3.5"),
}
# Prefixes of the jobs of `brew services`, now and until September 2026: Homebrew/brew#23750.
BREW_LABELS = ("sh.brew", "homebrew.mxcl")
# For each case: whether Homebrew is installed, the jobs of `brew services` and the clients, then the expected error.
SERVERS = {
    "right": (True, [], ["127.0.0.1", "192.0.2.0/24"], ""),
    "no Homebrew": (False, [], [], "There is no /opt/homebrew/bin/brew. Install Homebrew as described on brew.sh"),
    "brew services": (
        True,
        ["/L/sh.brew.postgresql@16.plist"],
        [],
        "brew services has a PostgreSQL server, /L/sh.brew.postgresql@16.plist",
    ),
    "names": (True, [], ["::1", "web1"], "postgresql_clients has the names web1; allowed on a Mac: addresses and networks"),
}
ERLANGS = {"29.0.2": "erlang@27", "27.3.4": "erlang", "28.4.1": "erlang@27"}


def services_of(role):
    tasks = yaml.safe_load((ROOT / f"roles/{role}/tasks/service.yml").read_text())
    return next(task["vars"] for task in tasks if "ansible.builtin.include_role" in task)


def looked_for(found=None):
    """The result of the role's search for a RabbitMQ job of `brew services`. `found` is the prefix of an existing job."""
    labels = [f"/L/{label}.rabbitmq.plist" for label in BREW_LABELS]
    return {"results": [{"item": path, "stat": {"exists": f"/{found}." in path}} for path in labels]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The values that a play prints for each host: each role's jobs, the log rules, and the results of the checks."""
    folder = tmp_path_factory.mktemp("macos")
    common_variables(folder)
    defaults = [yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text()) for role in ("services", "erlang", *ROLES)]
    hosts = {"hosts": {"agents": {}, "daemons": {}}, "vars": {name: value for values in defaults for name, value in values.items()}}
    (folder / "hosts.json").write_text(json.dumps({"all": hosts}))
    (folder / "group_vars/all/10-wired.json").write_text(json.dumps(WIRED))
    (folder / "templates").symlink_to(ROOT / "roles/services/templates")
    (folder / "files").symlink_to(ROOT / "roles/flower/files")
    known = json.dumps(
        {host: {**facts, "user_gid": 20, "os_family": "Darwin", "memtotal_mb": 16384} for host, facts in FACTS.items()}
    )
    set_facts = {
        name: f"{{{{ known[inventory_hostname].{name} }}}}" for name in (*FACTS["agents"], "user_gid", "os_family", "memtotal_mb")
    }
    files = ["services/vars/main", "django/vars/main", "celery/vars/main/main", "flower/vars/main", "python_environment/vars/main"]
    files += ["postgresql/vars/main", "rabbitmq/vars/main/main", "rabbitmq/vars/main/compatibility", "rabbitmq/vars/main/services"]
    files += ["rabbitmq/vars/main/checklist"]
    tasks = [{"set_fact": {**set_facts, "cacheable": True}, "vars": {"known": json.loads(known)}}]
    tasks += [
        {"include_vars": f"{ROOT}/roles/{role}/vars/Darwin.yml"}
        for role in ("erlang", "python_environment", *ROLES)
        if role != "celery"
    ]
    shown = []

    def show(name, value, **variables):
        shown.append(name)
        tasks.append({"debug": {"msg": value}, "vars": variables})

    for role in ROLES:
        show(role, "{{ __services_jobs }}", **services_of(role))
    show("logs", "{{ lookup('template', 'newsyslog.conf.j2') }}", **services_of("celery"))
    show("domain", "{{ [__services_job_dir, __services_user] }}", **services_of("django"))
    python = {"host_python": ""}
    names = ("interpreter", "ca_bundle", "packages[0]")
    paths = [f"__python_environment_{name}" for name in names] + ["__django_manage", "__rabbitmq_program"]
    show("paths", f"{{{{ [{', '.join(paths)}] }}}}", **python)
    for case, (stable, installed, erlang, _, _) in FORMULAE.items():
        formula = {"versions": {"stable": stable}, "installed": [{"version": version} for version in installed]}
        said = {"stdout": json.dumps({"formulae": [formula]})}
        value = [
            "{{ __rabbitmq_formula_level }}",
            "{{ __rabbitmq_formula_rules | rejectattr('that') | map(attribute='fail_msg') | join }}",
        ]
        there = looked_for()
        show(case, value, __rabbitmq_info=said, rabbitmq_erlang_version=erlang, __rabbitmq_brew_services=there)
    for memory_max in ("80%", "2G"):
        show(f"watermark with {memory_max}", "{{ __rabbitmq_watermark }}", rabbitmq_memory_max=memory_max)
    show("brew jobs", "{{ __rabbitmq_brew_jobs }}")
    for label in BREW_LABELS:
        value = ["{{ (__rabbitmq_formula_rules | first).that }}", "{{ (__rabbitmq_formula_rules | first).fail_msg }}"]
        show(label, value, __rabbitmq_brew_services=looked_for(label))
    rules = "{{ __postgresql_mac_rules | rejectattr('that') | map(attribute='fail_msg') }}"
    for case, (homebrew, jobs, clients, _) in SERVERS.items():
        found = {
            "__postgresql_brew": {"stat": {"exists": homebrew}},
            "__postgresql_brew_jobs": {"files": [{"path": path} for path in jobs]},
        }
        addresses = [{"database": "mailroom", "user": "mailroom", "address": address} for address in clients]
        show(f"server: {case}", rules, **found, postgresql_clients=addresses)
        show(f"server of nobody: {case}", rules, **found, postgresql_clients=addresses, host_homebrew_user="")
    show(
        "postgresql files",
        ["{{ __postgresql_settings }}", "{{ lookup('template', pg_hba) }}", "{{ lookup('template', pg_ident) }}"],
        pg_hba=f"{ROOT}/roles/postgresql/templates/pg_hba.conf.j2",
        pg_ident=f"{ROOT}/roles/postgresql/templates/pg_ident.conf.j2",
        postgresql_clients=[{"database": "mailroom", "user": "mailroom", "address": "127.0.0.1"}],
        __postgresql_lookups={"results": []},
    )
    for stable in ERLANGS:
        said = {"stdout": json.dumps({"formulae": [{"versions": {"stable": stable}}]})}
        show(stable, "{{ __erlang_formula }}", __erlang_info=said)
    play = {"hosts": "agents,daemons", "gather_facts": False, "tasks": tasks}
    play["vars_files"] = [f"{ROOT}/roles/{name}.yml" for name in files]
    (folder / "play.json").write_text(json.dumps([play]))
    code, answer, output = playbook("-i", folder, folder / "play.json")
    assert code == 0, output
    results = [task["hosts"] for task in answer["plays"][0]["tasks"]][-len(shown) :]
    return {host: {name: result[host]["msg"] for name, result in zip(shown, results, strict=True)} for host in FACTS}


@pytest.fixture(scope="module")
def plists(answers):
    """The property lists, by host and label."""
    return {
        host: {job["name"]: plistlib.loads(job["content"].encode()) for role in ROLES for job in found[role]}
        for host, found in answers.items()
    }


def test_jobs_of_a_mac(plists):
    app = {"web", "relay", "worker@slow", "beat", "flower", "django-logs", "celery-logs", "flower-logs"}
    for host in FACTS:
        assert set(plists[host]) == {f"mailroom-{name}" for name in app} | {
            "rabbitmq-server",
            "rabbitmq-logs",
            "postgresql",
            "postgresql-logs",
        }


def test_every_job_is_kept_alive_and_contains_no_secret(plists, answers):
    for host, found in plists.items():
        for name, plist in found.items():
            assert plist["Label"] == name
            assert MARK not in str(plist)
            assert plist["StandardErrorPath"] == plist["StandardOutPath"]
            assert plist["Umask"] == 0o027
            if name.endswith("-logs"):
                assert plist["StartInterval"] == 3600
                assert "KeepAlive" not in plist
                continue
            assert (plist["KeepAlive"], plist["RunAtLoad"], plist["AbandonProcessGroup"]) == (True, True, False)
            assert plist["ThrottleInterval"] == 5
            assert plist["HardResourceLimits"] == plist["SoftResourceLimits"] == {"NumberOfFiles": 65536}
        assert MARK not in json.dumps(answers[host])


def test_plutil_accepts_the_property_lists(answers, tmp_path):
    if not shutil.which("plutil"):
        pytest.skip("There is no plutil on this machine.")
    for job in (job for found in answers.values() for role in ROLES for job in found[role]):
        file = tmp_path / "job.plist"
        file.write_text(job["content"])
        done = subprocess.run(["plutil", "-lint", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_agents_name_no_user_and_daemons_name_theirs(plists, answers):
    for plist in plists["agents"].values():
        assert "UserName" not in plist
        assert plist["LimitLoadToSessionType"] == ["Aqua", "Background"]
        assert plist["StandardOutPath"].startswith("/Users/me/Library/Logs/")
    users = {name: plist["UserName"] for name, plist in plists["daemons"].items()}
    assert (users["mailroom-web"], users["mailroom-beat"]) == ("mailroom", "mailroom")
    assert (users["mailroom-flower"], users["rabbitmq-server"], users["postgresql"]) == ("mailroom-flower", "brewer", "brewer")
    # The job that rotates logs runs as the logs' owner.
    assert users["mailroom-flower-logs"] == "mailroom-flower"
    assert plists["daemons"]["mailroom-web"]["StandardOutPath"] == "/Library/Logs/mailroom/django/mailroom-web.log"
    assert answers["agents"]["domain"] == ["/Users/me/Library/LaunchAgents", "me"]
    assert answers["daemons"]["domain"] == ["/Library/LaunchDaemons", "mailroom"]


def test_a_workers_stop_timeout_exceeds_its_task_time_limit(plists):
    plist = plists["agents"]["mailroom-worker@slow"]
    assert "--time-limit=900" in plist["ProgramArguments"]
    assert plist["ExitTimeOut"] > 900


def test_web_service_opens_its_own_socket(plists):
    words = plists["agents"]["mailroom-web"]["ProgramArguments"]
    assert {"--bind=[::1]:8001", "--bind=unix:/run/other.sock"} <= set(words)
    assert not [word for word in words if "worker-tmp-dir" in word]


def test_a_job_reads_its_environment_and_becomes_its_command(plists, tmp_path):
    """Runs the job's ProgramArguments, but with a PID file, an environment file and a command from this test."""
    shell = plists["agents"]["mailroom-relay"]["ProgramArguments"]
    assert shell[3] == "/Users/me/Library/Logs/mailroom/django/mailroom-relay.pid"
    files = [f"{PREFIX}/opt/mailroom/current/environment", f"{PREFIX}/opt/mailroom/current/environment.web"]
    assert shell[4:] == [*files, "--", f"{PREFIX}/opt/mailroom/current/venv/bin/python", "manage.py", "relay"]
    (tmp_path / "environment").write_text("""QUOTE='it'\\''s "$HOME"'\nURL='first'\n""")
    (tmp_path / "environment.web").write_text("URL='second'\n")
    pid_file = tmp_path / "pid"
    command = ["/bin/sh", "-c", 'printf "%s|%s|%s|%s" "$$" "$QUOTE" "$URL" "$1"', "name", "a  b"]
    words = [*shell[:3], pid_file, tmp_path / "environment", tmp_path / "environment.web", "--", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    assert done.stdout == f"""{pid_file.read_text().strip()}|it's "$HOME"|second|a  b"""
    words = [*shell[:3], pid_file, tmp_path / "missing", "--", "echo", "ran"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode != 0, done.stdout) == (True, "")


def test_the_broker_runs_below_homebrews_prefix_on_the_requested_erlang(plists, answers):
    for host, homebrew in (("agents", "/opt/homebrew"), ("daemons", "/usr/local")):
        plist = plists[host]["rabbitmq-server"]
        assert plist["ProgramArguments"][5:] == [f"{homebrew}/opt/rabbitmq/sbin/rabbitmq-server"]
        path = plist["EnvironmentVariables"]["PATH"].split(":")
        assert path[:3] == [f"{homebrew}/opt/{name}" for name in ("erlang@27/bin", "erlang/bin", "rabbitmq/sbin")]
        python, bundle, package, _, broker = answers[host]["paths"]
        assert (python, package) == (f"{homebrew}/bin/python3.13", "python@3.13")
        assert bundle.startswith(homebrew)
        assert broker == plist["ProgramArguments"][5]
    assert answers["agents"]["paths"][3] == f"{PREFIX}/bin/mailroom-manage"
    assert answers["daemons"]["paths"][3] == "/usr/local/bin/mailroom-manage"


def test_rotating_a_log_terminates_its_job(answers, plists):
    for host, owner in (("agents", "me:20"), ("daemons", "mailroom:")):
        lines = [line.split() for line in answers[host]["logs"].splitlines() if not line.startswith("#")]
        logs = {line[0]: line for line in lines}
        for name in ("mailroom-worker@slow", "mailroom-beat"):
            plist = plists[host][name]
            line = logs.pop(plist["StandardOutPath"])
            assert line[1:7] == [owner, "640", "5", "10240", "*", "B"]
            assert line[7:] == [plist["ProgramArguments"][3], "15"]
        assert not logs


@pytest.mark.parametrize("case", FORMULAE)
def test_homebrews_rabbitmq_is_accepted_or_rejected(answers, case):
    level, refusal = answers["agents"][case]
    assert level == FORMULAE[case][3]
    assert bool(refusal) == bool(FORMULAE[case][4])
    assert refusal.startswith(FORMULAE[case][4])
    if level == "refused":
        assert 'If erlang_version and rabbitmq_erlang_version are "27", Ansible installs the formula erlang@27' in refusal


@pytest.mark.parametrize("stable", ERLANGS)
def test_an_older_erlang_has_a_versioned_formula(answers, stable):
    assert answers["agents"][stable] == ERLANGS[stable]


def test_a_broker_of_brew_services_is_searched_by_both_labels(answers):
    for host, folder in (("agents", "/Users/me/Library/LaunchAgents"), ("daemons", "/Library/LaunchDaemons")):
        assert answers[host]["brew jobs"] == [f"{folder}/{label}.rabbitmq.plist" for label in BREW_LABELS]


@pytest.mark.parametrize("label", BREW_LABELS)
def test_a_broker_of_brew_services_is_rejected_with_a_solution(answers, label):
    holds, refusal = answers["agents"][label]
    assert not holds
    assert f"brew services has a broker, /L/{label}.rabbitmq.plist" in refusal
    assert "`brew services stop rabbitmq`" in refusal


def test_the_database_has_a_cluster_other_than_the_formulas(plists):
    for host, homebrew in (("agents", "/opt/homebrew"), ("daemons", "/usr/local")):
        plist = plists[host]["postgresql"]
        assert plist["ProgramArguments"][-3:] == [
            f"{homebrew}/opt/postgresql@17/bin/postgres",
            "-D",
            f"{homebrew}/var/lib/postgresql/17",
        ]
        assert plist["EnvironmentVariables"] == {"LC_ALL": "C"}


def test_the_database_is_restarted_after_an_upgrade_and_for_its_files(answers):
    (server, _) = answers["agents"]["postgresql"]
    cluster = "/opt/homebrew/var/lib/postgresql/17"
    files = [f"{cluster}/{name}" for name in ("conf.d/50-ansible.conf", "pg_hba.conf", "pg_ident.conf")]
    assert server["restart_on"] == [*files, "/opt/homebrew/opt/postgresql@17"]


def test_the_database_accepts_its_owner_as_postgres_and_the_listed_clients(answers):
    for host, owner in (("agents", "me"), ("daemons", "brewer")):
        settings, access, names = answers[host]["postgresql files"]
        cluster = "/opt/homebrew/var/lib/postgresql/17" if host == "agents" else "/usr/local/var/lib/postgresql/17"
        # Only the owner can access this folder.
        assert settings["unix_socket_directories"] == cluster
        assert [line for line in access.splitlines() if line[0] != "#"] == [
            "local all postgres peer map=owner",
            'host "mailroom" "mailroom" 127.0.0.1/32 scram-sha-256',
        ]
        assert [line for line in names.splitlines() if line[0] != "#"] == [f'owner "{owner}" postgres']


@pytest.mark.parametrize("case", SERVERS)
def test_a_mac_that_cannot_run_the_database_is_rejected(answers, case):
    refusals = answers["agents"][f"server: {case}"]
    assert len(refusals) == bool(SERVERS[case][3])
    assert "".join(refusals).startswith(SERVERS[case][3])


def test_root_requires_the_owner_of_homebrew(answers):
    assert answers["agents"]["server of nobody: right"] == answers["daemons"]["server: right"] == []
    (refusal,) = answers["daemons"]["server of nobody: right"]
    assert refusal.startswith("host_homebrew_user is empty and Ansible runs as root")


SERVER = """
import pathlib, signal, sys
said = pathlib.Path(sys.argv[2])
def end(number, _):
    said.write_text(signal.Signals(number).name)
    sys.exit(4)
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, end)
said.write_text("up")
if sys.argv[3:] == ["dies"]:
    sys.exit(5)
signal.pause()
"""


def launched(plist, tmp_path, *more):
    """Runs the job's command with a fake server. Returns the fake's output file and the shell's process."""
    executable(tmp_path / "postgres", SERVER)
    shell = plist["ProgramArguments"][5:8]
    assert shell[:2] == ["/bin/sh", "-c"]
    return tmp_path / "said", subprocess.Popen([*shell, tmp_path / "postgres", "-D", tmp_path / "said", *more])


def test_stopping_the_job_waits_for_a_fast_shutdown(plists, tmp_path):
    """After TERM, the server would wait for its clients until launchd kills the server."""
    said, shell = launched(plists["agents"]["postgresql"], tmp_path)
    until = time.monotonic() + 20
    while not said.exists() or said.read_text() != "up":
        assert time.monotonic() < until
        time.sleep(0.02)
    shell.terminate()
    assert shell.wait(20) == 4
    assert said.read_text() == "SIGINT"


def test_a_job_ends_with_its_server(plists, tmp_path):
    _, shell = launched(plists["agents"]["postgresql"], tmp_path, "dies")
    assert shell.wait(20) == 5


@pytest.mark.parametrize("memory_max", ["80%", "2G"])
def test_memory_watermark_is_a_share_of_the_hosts_memory(answers, memory_max):
    """A Mac has no memory limit for the broker."""
    assert answers["agents"][f"watermark with {memory_max}"] == {"vm_memory_high_watermark.relative": 0.6}
