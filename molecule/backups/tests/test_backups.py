"""Tests backups over SFTP, to a directory and to a stand-in of an S3-compatible store, and the restore of an environment."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest
import requests

DUMPS = "/var/lib/mailroom-backups/dumps"
SUCCESS = "/var/lib/mailroom-backups/success.prom"
METRICS = "/var/lib/prometheus/node-exporter/mailroom-backups.prom"
REPOSITORY = "/home/ansible/backups/site1"
ADDRESS = "one@example.net"


@pytest.fixture
def backup(root):
    """Runs the unit, as its timer does; returns testinfra's result."""
    return lambda: root("systemctl start mailroom-backup")


@pytest.fixture
def snapshots(root):
    def listed():
        done = root("mailroom-restic snapshots --json")
        assert done.rc == 0, done.stderr
        return json.loads(done.stdout)

    return listed


@pytest.fixture
def status(run_playbook, tmp_path):
    def read():
        done = run_playbook("playbooks/ops/status.yml", "--limit", "all", status_directory=str(tmp_path))
        assert (tmp_path / "status.json").exists(), done.stdout
        return json.loads((tmp_path / "status.json").read_text())

    return read


def test_timer_waits_for_its_time(root):
    shown = root("systemctl show --property=ActiveState,TimersCalendar mailroom-backup.timer").stdout
    assert "ActiveState=active" in shown and "OnCalendar=*-*-* 02:30:00" in shown


def test_backup_is_complete_and_encrypted(send, eventually, backup, root, on, variables):
    _, state = send()
    eventually(lambda: state() == "sent")
    assert backup().rc == 0
    names = root("mailroom-restic ls latest").stdout.split()
    assert {f"{DUMPS}/mailroom.pgc", f"{DUMPS}/definitions.json", f"{DUMPS}/rabbitmq.tar.gz"} <= set(names)
    # The dump is not compressed, so it contains the address as text.
    dump = f"mailroom-restic dump latest {DUMPS}/mailroom.pgc"
    assert int(root(f"{dump} | grep --count --text {ADDRESS}").stdout) > 0
    definitions = json.loads(root(f"mailroom-restic dump latest {DUMPS}/definitions.json").stdout)
    assert "mailroom" in {vhost["name"] for vhost in definitions["vhosts"]}
    found = on(
        "store1",
        f"find {REPOSITORY} -type f | wc -l; grep -r --text --count -e {ADDRESS} -e mailroom {REPOSITORY} || true",
    )
    count, *lines = found.split()
    assert int(count) > 4
    assert [line for line in lines if not line.endswith(":0")] == []
    # Nothing remains on the host.
    assert root(f"ls {DUMPS}").rc != 0
    assert root(f"grep --recursive --text --files-with-matches {ADDRESS} /var/lib/mailroom-backups").stdout == ""


def test_secrets_are_only_in_roots_files(root, variables):
    secret = variables["secret_backups_password"]
    for name in ("backups.environment", "backups.ssh-key"):
        assert root(f"stat --format='%U %a' /etc/mailroom/{name}").stdout.strip() == "root 600"
    assert secret not in root("systemctl cat mailroom-backup mailroom-backup.timer; systemctl show mailroom-backup").stdout
    assert secret not in root("journalctl --no-pager").stdout
    assert secret not in root("cat /usr/local/bin/mailroom-*").stdout


def test_programs_of_the_backup_have_no_privileges(root):
    unit = root("sed -n '/^NoNewPrivileges/,$p' /etc/systemd/system/mailroom-backup.service").stdout
    properties = " ".join(f"--property='{line}'" for line in unit.splitlines() if line)
    run = f"systemd-run --quiet --wait --pipe {properties} --property=User=root"
    as_postgres = "setpriv --reuid=postgres --regid=postgres --init-groups --inh-caps=-all -- grep Cap /proc/self/status"
    capabilities = dict(line.split() for line in root(f"{run} {as_postgres}").stdout.splitlines())
    assert {capabilities[name] for name in ("CapPrm:", "CapEff:", "CapInh:", "CapAmb:")} == {"0" * 16}
    for path in ("/etc/mailroom/x", "/usr/local/bin/x", "/root/x", "/var/lib/postgresql/x"):
        assert root(f"{run} touch {path}").rc != 0, path


def test_old_snapshots_are_forgotten(backup, root, snapshots):
    now = datetime.now()
    times = [now - timedelta(days=days) for days in (1, 1.01, 2, 3, 40, 41, 75, 110, 150)]
    for time in times:
        done = root(f"mailroom-restic backup --quiet --host site1 --time '{time:%Y-%m-%d %H:%M:%S}' /etc/hostname")
        assert done.rc == 0, done.stderr
    assert backup().rc == 0
    days = sorted({time.date() for time in [now, *times]}, reverse=True)
    # The scenario keeps the last snapshots of 2 days and of 3 months.
    months = {}
    for day in days:
        months.setdefault((day.year, day.month), day)
    wanted = {*days[:2], *list(months.values())[:3]}
    assert sorted(snapshot["time"][:10] for snapshot in snapshots()) == sorted(str(day) for day in wanted)


def test_status_and_smoke_test_report_the_age(status, play):
    report = status()
    assert {(each["host"], each["name"]) for each in report["backups"]} == {("site1", "postgresql"), ("site1", "rabbitmq")}
    assert all(each["hours"] < 1 for each in report["backups"])
    units = next(each["status"]["units"] for each in report["hosts"] if each["name"] == "site1")
    assert "active" in {unit["state"] for unit in units if unit["name"] == "mailroom-backup.timer"}
    assert "The oldest backup is 0 hours old." in play("smoke", smoke_backup_hours=1)


@pytest.fixture
def prometheus(url, variables):
    """Returns the values of the label `kind` in the result of a query."""
    login = ("monitoring", variables["secret_monitoring_password"])

    def kinds(query):
        answer = requests.get(f"{url(9090)}/api/v1/query", params={"query": query}, auth=login, timeout=10)
        answer.raise_for_status()
        return {each["metric"]["kind"] for each in answer.json()["data"]["result"]}

    return kinds


def test_alert_reads_the_metric(root, backup, eventually, prometheus):
    both = {"postgresql", "rabbitmq"}
    assert backup().rc == 0
    eventually(lambda: prometheus("time() - backup_last_success_timestamp_seconds < 600") == both, seconds=90)
    firing = 'ALERTS{alertname="BackupOld", alertstate="firing"}'
    eventually(lambda: prometheus(firing) == set(), seconds=90)
    assert root(f"sed -i -E \"s/ [0-9]+$/ $(date --date='27 hours ago' +%s)/\" {METRICS}").rc == 0
    eventually(lambda: prometheus(firing) == both, seconds=90)
    assert backup().rc == 0


FAILURES = {
    "a wrong password": (
        "site1",
        "sed -i.right s/^RESTIC_PASSWORD=.*/RESTIC_PASSWORD=wrong-password/ /etc/mailroom/backups.environment",
        "mv /etc/mailroom/backups.environment.right /etc/mailroom/backups.environment",
        "wrong password",
    ),
    "a missing repository": (
        "store1",
        f"mv {REPOSITORY} {REPOSITORY}.away",
        f"mv {REPOSITORY}.away {REPOSITORY}",
        "repository does not exist",
    ),
    "a full disk": (
        "store1",
        f"mkdir {REPOSITORY}.full && mount -t tmpfs -o size=4m,mode=0777 none {REPOSITORY}.full "
        f"&& cp -a {REPOSITORY}/. {REPOSITORY}.full "
        f"&& {{ cat /dev/zero >{REPOSITORY}.full/rest || true; }} && mount --bind {REPOSITORY}.full {REPOSITORY}",
        f"umount {REPOSITORY} {REPOSITORY}.full && rmdir {REPOSITORY}.full",
        "no space left",
    ),
    "a stopped database": ("site1", "systemctl stop postgresql@17-main", "systemctl start postgresql@17-main", "pg_dump: error"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_visible_and_keeps_the_time_of_the_last_success(name, root, on, backup, status, snapshots):
    place, begin, end, message = FAILURES[name]
    before, stored = root(f"cat {SUCCESS} {METRICS}").stdout, snapshots()
    assert before
    on(place, begin)
    try:
        assert backup().rc != 0
        log = root("journalctl --no-pager --lines=30 --output=cat --unit=mailroom-backup").stdout
        found = [finding for finding in status()["findings"] if "mailroom-backup.service" in finding["text"]]
    finally:
        on(place, end)
    assert message in log
    assert [finding["level"] for finding in found] == ["fault"]
    assert root(f"cat {SUCCESS} {METRICS}").stdout == before
    assert [each["id"] for each in snapshots()] == [each["id"] for each in stored]
    assert backup().rc == 0
    assert root("systemctl is-failed mailroom-backup").stdout.strip() == "inactive"


def test_restore_into_an_empty_environment(root, backup, send, eventually, play, snapshots, inbox):
    subject, state = send()
    eventually(lambda: state() == "sent")
    root("systemctl stop 'mailroom-worker@*'")
    unsent, unsent_state = send()
    assert backup().rc == 0
    stored = [each["id"] for each in snapshots()]

    # Delete the data, and all files that the role has written in earlier runs.
    root("systemctl stop mailroom.target")
    assert root("runuser -u postgres -- dropdb --force mailroom && rabbitmqctl delete_vhost mailroom").rc == 0
    root("rm -rf /var/lib/mailroom-backups /etc/mailroom/backups.* /usr/local/bin/mailroom-backup /usr/local/bin/mailroom-restic")
    play("site")
    count = "runuser -u postgres -- psql --dbname=mailroom --tuples-only --no-align --command='SELECT count(*) FROM emails_email'"
    assert root(count).stdout.strip() == "0"
    # A backup of the empty database would be restored instead.
    assert [each["id"] for each in snapshots()] == stored

    assert "To confirm, add -e confirm=yes" in play("ops/restore_environment", fails=True)
    assert root(count).stdout.strip() == "0"
    assert "has no snapshot 0123abcd" in play("ops/restore_environment", fails=True, confirm="yes", backups_snapshot="0123abcd")
    play("ops/restore_environment", confirm="yes")
    assert state() == "sent"
    eventually(lambda: unsent_state() == "sent", seconds=90)
    eventually(lambda: unsent in inbox())
    assert inbox().count(subject) == 1


def test_directory_on_the_host(root, play, snapshots):
    local = {"backups_repository": "/srv/backups"}
    root("rm -rf /srv/backups")
    play("backups", **local)
    assert len(snapshots()) == 1
    assert root("stat --format='%U %a' /srv/backups/site1/config").stdout.split()[0] == "root"
    assert "changed=0" in play("backups", **local)
    # A disk that is not mounted does not get a new repository.
    root("rm -rf /srv/backups")
    assert "changed=0" in play("backups", **local)
    assert root("systemctl start mailroom-backup").rc != 0
    assert root("ls /srv/backups").rc != 0


def test_stand_in_of_an_s3_store(root, play, snapshots):
    play(
        "backups",
        backups_repository="s3:http://store1:5000/mailroom",
        backups_environment={"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "Anything-12345"},
    )
    assert len(snapshots()) == 1
    assert "Anything-12345" not in root("journalctl --no-pager; systemctl cat mailroom-backup").stdout
    assert root(f"mailroom-restic dump latest {DUMPS}/mailroom.pgc | head --bytes=5").stdout == "PGDMP"


def test_wrong_password_of_an_existing_repository_is_refused(play):
    output = play("backups", fails=True, backups_password="Another-password-1")  # noqa: S106 - of this test
    assert "wrong password" in output and "Another-password-1" not in output
    play("backups")


def test_without_a_repository_the_schedule_is_removed(root, play):
    play("backups", backups_repository="")
    assert root("systemctl cat mailroom-backup.timer").rc != 0
    play("backups")
    assert root("systemctl is-active mailroom-backup.timer").stdout.strip() == "active"
