"""Tests the whole environment as LaunchAgents of one user: on the stand-in of testbed/images/macos, or on a real Mac."""

from __future__ import annotations

import re

import pytest
import requests

RECOVERY = "database system was not properly shut down"
JOBS = ["django_celery.stack.services : Manage the jobs of mailroom/celery"]


@pytest.fixture
def launchctl(host):
    uid = host.check_output("id -u")
    return lambda verb, label, *words: host.run(f"launchctl {' '.join([verb, *words])} gui/{uid}/{label}")


@pytest.fixture
def process(launchctl):
    """Returns the PID of a job, or None."""

    def number(label):
        found = re.search(r"^\tpid = (\d+)$", launchctl("print", label).stdout, re.MULTILINE)
        return found and int(found[1])

    return number


@pytest.fixture
def playbook(run_playbook):
    """Runs the workers' playbook as an operator does; returns the tasks that changed something."""

    def run(**variables):
        done = run_playbook("playbooks/workers.yml", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall(r"^TASK \[([^\]]+)\] \**\n(?:(?!TASK|PLAY).*\n)*?changed: ", done.stdout, re.MULTILINE)

    return run


@pytest.fixture
def prefix(host):
    """Homebrew's prefix."""
    return "/opt/homebrew" if host.file("/opt/homebrew/bin/brew").exists else "/usr/local"


@pytest.fixture
def logged(host, prefix):
    """Returns how many times the database logged a string."""
    return lambda text: host.check_output(f"cat {prefix}/var/lib/postgresql/17/log/*.log").count(text)


@pytest.fixture
def logs(host):
    return f"{host.check_output('echo $HOME')}/Library/Logs/mailroom"


def test_email_arrives_and_flower_has_counted_its_task(send, inbox, url, eventually):
    subject, state = send()
    eventually(lambda: state() == "sent")
    assert inbox().count(subject) == 1
    counted = r'flower_events_total\{task="emails\.tasks\.deliver",type="task-succeeded"'
    eventually(lambda: re.search(counted, requests.get(f"{url(5555)}/metrics", timeout=10).text))


def test_no_process_runs_as_root(host):
    """The list includes the broker's port mapper, which leaves the broker's process group."""
    mine = host.check_output("id -un")
    # On a Mac, ps uses the text after the first = as a column's heading, and cuts lines without -ww.
    lines = host.check_output("ps -A -ww -o user= -o args=").splitlines()
    found = [line.split()[0] for line in lines if re.search(r"gunicorn|celery|manage\.py relay|beam\.smp|/epmd|postgres", line)]
    assert len(found) > 12
    assert set(found) == {mine}


def test_broker_uses_homebrews_prefix_and_the_requested_erlang(host, prefix, api):
    (node,) = api("nodes")
    paths = [*node["config_files"], node["db_dir"], *node["log_files"]]
    assert len(paths) > 2
    assert {path for path in paths if not path.startswith(f"{prefix}/")} <= {"<stdout>"}
    assert host.file(f"{prefix}/var/lib/rabbitmq/.erlang.cookie").mode == 0o400
    assert api("overview")["erlang_version"].split(".")[0] == "27"


def test_secrets_are_not_visible_to_others(host, variables, environment_secrets):
    home = host.check_output("echo $HOME")
    library = f"{home}/Library"
    seen = host.check_output(f"cat {library}/LaunchAgents/*.plist; ps -A -ww -o args; cat {library}/Logs/mailroom/*/*.log")
    assert [name for name, secret in environment_secrets.items() if secret in seen] == []
    # Only the owner can enter the folder of the environment file.
    open_ = host.check_output(f"find {home}/.local/etc/mailroom {home}/.local/var/lib/mailroom* -maxdepth 0 -perm -g+x")
    assert open_ == ""
    assert variables["secret_django_key"] in host.check_output(f"cat {home}/.local/opt/mailroom/current/environment")


def test_database_accepts_its_owner_on_the_socket_and_listed_clients_with_password(host, prefix, variables):
    cluster = f"{prefix}/var/lib/postgresql/17"

    def ask(address, user, query, password=""):
        return host.run(
            f"PGPASSWORD='{password}' {prefix}/opt/postgresql@17/bin/psql -h {address} -U {user} -w -Atc '{query}' mailroom"
        )

    assert ask(cluster, "postgres", "SHOW data_directory").stdout.strip() == cluster
    assert ask("127.0.0.1", "mailroom", "SELECT 1", variables["secret_postgresql_app_password"]).stdout.strip() == "1"
    assert "no password supplied" in ask("127.0.0.1", "mailroom", "SELECT 1").stderr
    for address, user in (("127.0.0.1", "postgres"), (cluster, "mailroom")):
        assert "no pg_hba.conf entry" in ask(address, user, "SELECT 1").stderr
    # The formula's cluster trusts all users. The role does not change that cluster.
    assert host.file(f"{prefix}/var/postgresql@17/PG_VERSION").exists
    assert not host.file(f"{prefix}/var/postgresql@17/postmaster.pid").exists


def test_stopped_database_does_not_wait_for_its_clients(host, process, logged, send, eventually):
    before, ended, recovered = process("postgresql"), logged("received fast shutdown request"), logged(RECOVERY)
    host.check_output(f"kill -TERM {before}")
    eventually(lambda: process("postgresql") not in (None, before))
    _, state = eventually(send)
    eventually(lambda: state() == "sent", seconds=60)
    assert logged("received fast shutdown request") == ended + 1
    assert logged(RECOVERY) == recovered


def test_killed_database_comes_back(host, process, logged, send, eventually):
    before, recovered = process("postgresql"), logged(RECOVERY)
    host.check_output(f"kill -9 {before}")
    eventually(lambda: process("postgresql") not in (None, before))
    _, state = eventually(send)
    eventually(lambda: state() == "sent", seconds=60)
    assert logged(RECOVERY) == recovered + 1


def test_killed_worker_comes_back(host, send, process, eventually):
    before = process("mailroom-worker@mail")
    host.check_output(f"kill -9 {before}")
    eventually(lambda: process("mailroom-worker@mail") not in (None, before))
    _, state = send()
    eventually(lambda: state() == "sent", seconds=60)


def test_large_log_is_rotated_and_its_process_writes_to_the_new_file(host, launchctl, logs, process, eventually):
    """Runs the hourly log rotation job."""
    before = process("mailroom-beat")
    host.check_output(f"head -c 11000000 /dev/zero >> {logs}/celery/mailroom-beat.log")
    assert launchctl("kickstart", "mailroom-celery-logs").rc == 0
    eventually(lambda: process("mailroom-beat") not in (None, before))
    assert host.file(f"{logs}/celery/mailroom-beat.log.0").size >= 11000000
    eventually(lambda: "beat: Starting" in host.file(f"{logs}/celery/mailroom-beat.log").content_string)
    host.check_output(f"rm {logs}/celery/mailroom-beat.log.0")


def test_manual_changes_to_jobs_are_repaired_without_touching_others(host, playbook, process, launchctl):
    """An edited property list, a job that was booted out and disabled, and an environment file newer than its processes."""
    agents = f"{host.check_output('echo $HOME')}/Library/LaunchAgents"
    web = process("mailroom-web")
    host.check_output(f"sed -i.bak 's/<integer>150</<integer>1</' '{agents}/mailroom-worker@mail.plist'")
    host.check_output(f"rm '{agents}/mailroom-worker@mail.plist.bak'")
    launchctl("bootout", "mailroom-beat")
    assert launchctl("disable", "mailroom-beat").rc == 0
    host.check_output("touch ~/.local/opt/mailroom/current/environment")
    before = process("mailroom-worker@maintenance")
    assert playbook() == JOBS
    assert process("mailroom-beat")
    assert process("mailroom-worker@maintenance") not in (None, before)
    assert "exit timeout = 150" in launchctl("print", "mailroom-worker@mail").stdout
    assert process("mailroom-web") == web
    assert playbook() == []


def test_unlisted_worker_is_booted_out(playbook, process, launchctl):
    kept = [{"name": "mail", "queues": ["mail.v1", "maintenance.v1"], "time_limit": 120}]
    assert playbook(celery_workers=kept) == [*JOBS, "django_celery.stack.services : Configure log rotation"][::-1]
    gone = launchctl("print", "mailroom-worker@maintenance")
    assert (gone.rc, "Could not find service" in gone.stderr) == (113, True)
    playbook()
    assert process("mailroom-worker@maintenance")


def test_everything_runs_after_a_reboot(reboot, send, inbox, variables, eventually):
    if "testbed_platform" not in variables:
        pytest.skip("The test does not reboot a real Mac.")
    reboot()
    subject, state = eventually(send, seconds=60)
    eventually(lambda: state() == "sent", seconds=90)
    assert inbox().count(subject) == 1
