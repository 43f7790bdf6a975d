"""Tests a database with a standby: replication, refusals, and promotions under load. The tests run in this order."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import requests

PROJECT = Path(__file__).resolve().parents[3]
DATA = "/var/lib/postgresql/17/main"
PROMOTED = {"wiring_database": "db2"}


@pytest.fixture
def sql(on):
    """Runs a query as the superuser on a host; returns the rows as text."""

    def run(name, query, database="postgres"):
        return on(name, f"cd / && runuser -u postgres -- psql --no-psqlrc --dbname={database} -tAc {shlex.quote(query)}")

    return run


@pytest.fixture
def streams(sql):
    """Whether the server on a host is streaming to a standby."""
    return lambda primary: "streaming" in sql(primary, "SELECT state FROM pg_stat_replication")


@pytest.fixture(scope="module")
def run():
    """Runs a playbook for all hosts of the scenario; returns the finished process."""

    def ansible(playbook, *arguments, **variables):
        words = [playbook, *arguments, "--extra-vars", json.dumps(variables)]
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", *words],
            cwd=PROJECT,
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
            capture_output=True,
            text=True,
            check=False,
        )

    return ansible


def said(done):
    """The output, with Ansible's wrapped lines joined."""
    return " ".join((done.stdout + done.stderr).split())


def with_testbed(code):
    """Runs Python code with the testbed's modules, and the path of the scenario's inventory."""
    start = "import sys; from pathlib import Path; from testbed import machine, stack; inventory = Path(sys.argv[1]); "
    words = [sys.executable, "-c", start + code, os.environ["MOLECULE_SCENARIO_DIRECTORY"] + "/inventory"]
    subprocess.run(words, cwd=PROJECT, check=True, capture_output=True)


@pytest.fixture
def load(site, variables):
    """Posts ten emails per second during a with block. `accepted` gets the subjects of those with the response 202."""

    class Load:
        def __init__(self):
            self.accepted, self.refused, self.ended = [], [], threading.Event()
            self.threads = [threading.Thread(target=self.post) for _ in range(4)]

        def post(self):
            headers = {"Authorization": f"Bearer {variables['secret_app_api_key']}"}
            while not self.ended.wait(0.4):
                subject = f"load {uuid.uuid4()}"
                email = {"subject": subject, "text": "Hello.", "to": ["one@example.net"]}
                try:
                    status = requests.post(f"{site}/api/emails", json=email, headers=headers, timeout=10).status_code
                except requests.RequestException as error:
                    status = type(error).__name__
                (self.accepted if status == 202 else self.refused).append((time.time(), subject, status))

        def __enter__(self):
            for thread in self.threads:
                thread.start()
            time.sleep(8)
            return self

        def __exit__(self, *_):
            begin = time.time()
            # The application must accept emails again.
            while time.time() < begin + 60 and (not self.accepted or self.accepted[-1][0] < begin):
                time.sleep(0.5)
            time.sleep(5)
            self.ended.set()
            for thread in self.threads:
                thread.join()

        def subjects(self):
            return {subject for _, subject, _ in self.accepted}

        def longest_gap(self):
            times = sorted(moment for moment, _, _ in self.accepted)
            return max(after - before for before, after in itertools.pairwise(times))

    return Load


def test_standby_streams_over_tls(sql):
    query = "SELECT usename, application_name, state, sync_state, ssl FROM pg_stat_replication JOIN pg_stat_ssl USING (pid)"
    assert sql("db1", query) == "replication|standby_db2|streaming|quorum|t"
    assert sql("db2", "SELECT pg_is_in_recovery()") == "t"
    assert "sslmode=verify-full" in sql("db2", "SHOW primary_conninfo")


def test_slot_keeps_a_limited_amount_of_wal(sql):
    assert sql("db1", "SELECT slot_name, active FROM pg_replication_slots") == "standby_db2|t"
    assert sql("db1", "SHOW max_slot_wal_keep_size") == "10GB"


def test_only_the_standby_can_replicate(on, variables):
    password = variables["secret_postgresql_replication_password"]
    stranger = (
        "import psycopg, sys\n"
        "try:\n    psycopg.connect(sys.argv[1], autocommit=True)\n    print('connected')\n"
        "except psycopg.Error as error:\n    print(error)\n"
    )
    conninfo = f"host=db1 user=replication password={password} replication=true sslmode=require"
    done = on("app1", f"/opt/mailroom/current/venv/bin/python -c {shlex.quote(stranger)} {shlex.quote(conninfo)}")
    assert "no pg_hba.conf entry for replication connection" in done
    for more, sentence in (
        ("replication=true sslmode=require", ""),
        ("replication=true sslmode=disable", "no pg_hba.conf entry for replication connection"),
        ("dbname=postgres sslmode=require", "no pg_hba.conf entry for host"),
        ("dbname=mailroom sslmode=require", "no pg_hba.conf entry for host"),
    ):
        conninfo = f"host=db1 user=replication password={password} {more}"
        done = on("db2", f"psql {shlex.quote(conninfo)} -c IDENTIFY_SYSTEM 2>&1 >/dev/null || true")
        assert (sentence in done) if sentence else (done == ""), done


def test_application_connects_to_the_server_that_accepts_writes(on):
    url = on("app1", "grep ^DATABASE_URL /opt/mailroom/current/environment")
    assert "@db1,db2:5432/" in url
    assert "target_session_attrs=read-write" in url and "sslmode=verify-full" in url and "connect_timeout=2" in url


def test_status_shows_the_lag_and_a_missing_standby(run, on, eventually, streams):
    done = run("playbooks/ops/status.yml", wiring_repository=str(PROJECT))
    assert re.search(r"db1 db2 streaming quorum [\d,]+ bytes, ", said(done)), said(done)
    on("db2", "systemctl stop postgresql@17-main")
    try:
        done = run("playbooks/ops/status.yml", wiring_repository=str(PROJECT))
        assert done.returncode != 0
        assert "The standby db2 is not streaming: missing." in said(done)
        assert "Standbys that do not stream: db2." in said(run("playbooks/smoke.yml"))
    finally:
        on("db2", "systemctl start postgresql@17-main")
    eventually(lambda: streams("db1"))


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        (
            "db1",
            f"db1 should be a standby of db2, but {DATA} is the data directory of a primary, which was in use.",
        ),
        ("db2", "db2 has a standby, and postgresql_primary is empty, so it would be the primary."),
    ],
)
def test_inventory_that_names_the_standby_as_the_primary_is_refused(run, streams, limit, sentence):
    done = run("site.yml", "--tags=postgresql", f"--limit={limit}", **PROMOTED)
    assert done.returncode != 0
    assert sentence in said(done), said(done)
    assert streams("db1")


def test_only_a_standby_is_promoted(run, streams):
    for name, sentence in (
        ("db3", "promote is db3; allowed: the name of a standby (db2)."),
        ("db1", "db1 is the primary; allowed: a standby"),
    ):
        done = run("playbooks/ops/promote_postgresql.yml", promote=name)
        assert done.returncode != 0
        assert sentence in said(done), said(done)
    assert streams("db1")


def test_killed_clone_is_repaired(run, on, eventually, streams):
    on("db2", f"systemctl stop postgresql@17-main && rm -rf {DATA}")
    on("db2", "systemd-run --unit=killer sh -c 'while :; do pkill -KILL pg_basebackup; done'")
    done = run("site.yml", "--tags=postgresql", postgresql_synchronous=False)
    on("db2", "systemctl stop killer")
    assert done.returncode != 0 and "Copy the primary's data" in said(done)
    # The files that remain if a run is killed during the copy.
    on("db2", f"test -e {DATA}.clone || install -d -o postgres -g postgres -m 0700 {DATA}.clone && touch {DATA}.clone/PG_VERSION")
    done = run("site.yml", "--tags=postgresql")
    assert done.returncode == 0, said(done)
    assert streams("db1")
    on("db2", f"test ! -e {DATA}.clone")


def test_second_run_changes_nothing(run):
    done = run("site.yml", "--tags=postgresql")
    assert done.returncode == 0 and "changed=0" in done.stdout, said(done)
    assert [line for line in done.stdout.splitlines() if "changed=" in line and "changed=0" not in line] == []


def test_no_accepted_email_is_lost_if_the_host_of_the_primary_dies(run, load, inbox, eventually, capsys):
    with load() as sent:
        with_testbed("machine.podman('kill', '--signal=KILL', stack.find(inventory, 'db1').name)")
        killed = time.time()
        done = run("playbooks/ops/promote_postgresql.yml", promote="db2")
        assert done.returncode != 0 and "Turn the host off, and add -e old_primary_is_off=yes" in said(done), said(done)
        done = run("playbooks/ops/promote_postgresql.yml", promote="db2", old_primary_is_off="yes")
        assert done.returncode == 0, said(done)
        assert "Each confirmed write is on it" in said(done)
        promoted = time.time()
    with capsys.disabled():
        print(
            f"\n{len(sent.accepted)} accepted, {len(sent.refused)} refused, promoted after {promoted - killed:.1f} s, "
            f"longest gap {sent.longest_gap():.1f} s"
        )
    assert max(moment for moment, _, _ in sent.accepted) > promoted
    eventually(lambda: sent.subjects() <= set(inbox()), seconds=180)


def test_environment_runs_without_the_old_primary(run, send, eventually):
    """The inventory no longer has db1."""
    done = run("site.yml", "--limit=all:!db1", wiring_standbys=[], **PROMOTED)
    assert done.returncode == 0, said(done)
    _, state = send()
    eventually(lambda: state() == "sent")


def test_old_primary_becomes_a_standby_and_keeps_its_old_data(run, on, sql, streams, send, eventually):
    with_testbed("machine.start(stack.find(inventory, 'db1').name)")
    subprocess.run(
        [sys.executable, "-m", "testbed", "up", "--inventory", os.environ["MOLECULE_SCENARIO_DIRECTORY"] + "/inventory"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
    )
    done = run("site.yml", **PROMOTED)
    assert done.returncode != 0 and "run site.yml with -e postgresql_replace_data=db1" in said(done), said(done)
    done = run("site.yml", "-e", "postgresql_replace_data=db1", **PROMOTED)
    assert done.returncode == 0, said(done)
    assert streams("db2")
    assert sql("db1", "SELECT pg_is_in_recovery()") == "t"
    assert len(on("db1", f"ls -d {DATA}.replaced-*").splitlines()) == 1
    done = run("site.yml", "--tags=postgresql", **PROMOTED)
    assert [line for line in done.stdout.splitlines() if "changed=" in line and "changed=0" not in line] == []
    _, state = send()
    eventually(lambda: state() == "sent")


def test_planned_promotion_loses_nothing_and_stops_the_old_primary(run, load, on, inbox, eventually):
    """The playbook passes the end of the old primary's WAL as postgresql_wal_end."""
    with load() as sent:
        done = run("playbooks/ops/promote_postgresql.yml", promote="db1", **PROMOTED)
        assert done.returncode == 0, said(done)
        assert "It has all data of the old primary." in said(done)
    eventually(lambda: sent.subjects() <= set(inbox()), seconds=180)
    assert on("db2", "systemctl is-enabled postgresql@17-main || true") == "masked"
    # A second run finds nothing to do.
    done = run("playbooks/ops/promote_postgresql.yml", promote="db1", **PROMOTED)
    assert done.returncode == 0 and "It was promoted before this run." in said(done), said(done)
    # wiring_database is still db2.
    done = run("site.yml", "--tags=postgresql", "--limit=db2", **PROMOTED)
    assert done.returncode != 0 and "db2 was the primary until" in said(done), said(done)
    done = run("site.yml", "--tags=postgresql", "-e", "postgresql_replace_data=db2")
    assert done.returncode == 0, said(done)


def test_without_synchronous_only_what_the_standby_lacks_is_lost(run, load, on, sql, capsys):
    """The standby receives nothing during the last seconds before the primary's host dies."""
    chain = "type filter hook input priority -10; policy accept;"
    rules = ["add table inet cut", f"add chain inet cut in {{ {chain} }}", "add rule inet cut in tcp sport 5432 drop"]
    done = run("site.yml", "--tags=postgresql", postgresql_synchronous=False)
    assert done.returncode == 0, said(done)
    with load() as sent:
        on("db2", f"nft '{'; '.join(rules)}'")
        paused = time.time()
        time.sleep(4)
        with_testbed("machine.podman('kill', '--signal=KILL', stack.find(inventory, 'db1').name)")
        killed = time.time()
        on("db2", "nft delete table inet cut")
        done = run("playbooks/ops/promote_postgresql.yml", promote="db2", old_primary_is_off="yes", postgresql_synchronous=False)
        assert done.returncode == 0, said(done)
        assert "Writes that the old primary had not sent are lost." in said(done)
    stored = set(sql("db2", "SELECT subject FROM emails_email", "mailroom").splitlines())
    lost = sorted(moment for moment, subject, _ in sent.accepted if subject not in stored)
    with capsys.disabled():
        print(f"\n{len(sent.accepted)} accepted, {len(lost)} lost, accepted in the last {killed - min(lost, default=killed):.1f} s")
    assert lost, "the standby had everything, so this test shows nothing"
    # A second for the request of the first email and the signal.
    assert paused - 1 < lost[0] and lost[-1] < killed + 1
