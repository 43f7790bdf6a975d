"""Tests pgBackRest's archive of base backups and WAL, and the restore of the database as it was at a time."""

from __future__ import annotations

import json
import time

import pytest

ARCHIVE = "/srv/archive"
DATA = "/var/lib/postgresql/17/main"
RESTORE = "ops/restore_postgresql_to_time"
ADDRESS = "one@example.net"


@pytest.fixture
def sql(root):
    """Runs a statement in the application's database; returns its output."""

    def run(statement):
        done = root(f'cd / && runuser -u postgres -- psql --dbname=mailroom -v ON_ERROR_STOP=1 -qtAc "{statement}"')
        assert done.rc == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def subjects(sql):
    return lambda: set(sql("SELECT subject FROM emails_email").splitlines())


@pytest.fixture
def now(root):
    """Returns the host's time in the format of the playbook, when at least a second has passed."""

    def read():
        time.sleep(1.1)
        return root("date --utc +'%Y-%m-%d %H:%M:%S+00'").stdout.strip()

    return read


@pytest.fixture
def archive(root):
    """Returns the state of the repository, as pgBackRest prints it."""
    command = "cd / && runuser -u postgres -- pgbackrest --stanza=main info --output=json"
    return lambda: json.loads(root(command).stdout)[0]


@pytest.fixture
def kept(root):
    """Returns the old data directories, which a restore keeps."""
    return lambda: root(f"ls --directory {DATA}.replaced-* 2>/dev/null").stdout.split()


def test_site_makes_the_first_base_backup(archive, root):
    state = archive()
    assert state["status"]["code"] == 0
    assert state["cipher"] == "aes-256-cbc"
    assert state["backup"][0]["type"] == "full"
    shown = root("systemctl show --property=ActiveState,TimersCalendar postgresql-base-backup.timer").stdout
    assert "ActiveState=active" in shown and "OnCalendar=*-*-* 04:15:00" in shown
    assert root("grep ^process-max /etc/pgbackrest/pgbackrest.conf").stdout.strip() == "process-max=2"
    assert root("grep ^repo1-retention-full= /etc/pgbackrest/pgbackrest.conf").stdout.strip() == "repo1-retention-full=3"


def test_archive_is_encrypted_and_only_postgres_reads_it(send, eventually, sql, archive, root, variables):
    _, state = send()
    eventually(lambda: state() == "sent")
    written = sql("SELECT pg_walfile_name(pg_switch_wal())")
    eventually(lambda: archive()["archive"][-1]["max"] >= written, seconds=60)
    assert root(f"grep --recursive --text --files-with-matches {ADDRESS} {ARCHIVE}").stdout == ""
    assert root(f"stat --format='%U %a' {ARCHIVE}").stdout.strip() == "postgres 750"
    assert root("stat --format='%U %G %a' /etc/pgbackrest/pgbackrest.conf").stdout.strip() == "root postgres 640"
    assert (
        variables["secret_postgresql_archive_password"]
        not in root("systemctl cat postgresql-base-backup; journalctl --no-pager").stdout
    )


def test_scheduled_backup_is_added(archive, root):
    before = archive()["backup"]
    done = root("systemctl start postgresql-base-backup")
    assert done.rc == 0, root("journalctl --no-pager --lines=20 --unit=postgresql-base-backup").stdout
    assert len(archive()["backup"]) == len(before) + 1


def test_database_is_restored_as_it_was_before_a_mistake(send, eventually, sql, subjects, now, play, kept, archive):
    before, state = send()
    eventually(lambda: state() == "sent")
    moment = now()
    time.sleep(1.1)
    after, state = send()
    eventually(lambda: state() == "sent")
    sql("TRUNCATE emails_email CASCADE")
    assert before not in subjects()

    assert "To confirm, add -e confirm=yes" in play(RESTORE, fails=True, restore_time=moment)
    assert subjects() == set() and kept() == []
    backups = len(archive()["backup"])
    play(RESTORE, restore_time=moment, confirm="yes")
    assert before in subjects() and after not in subjects()
    assert len(kept()) == 1
    # The restored cluster is archived too.
    assert len(archive()["backup"]) == backups + 1
    _, state = send()
    eventually(lambda: state() == "sent", seconds=90)
    # A standby that is cloned from this server does not stop at the time.
    assert sql("SELECT count(*) FROM pg_file_settings WHERE sourcefile LIKE '%auto.conf' AND name ~ '^(recovery|restore)_'") == "0"


def test_time_outside_of_the_archive_is_refused_before_the_application_stops(play, root, kept):
    directories, started = kept(), root("systemctl show --property=ActiveEnterTimestampMonotonic mailroom-web").stdout
    for moment in ("2020-01-01 00:00:00+00", "2100-01-01 00:00:00+00"):
        assert "allowed: a time between the end of the first base backup" in play(
            RESTORE, fails=True, restore_time=moment, confirm="yes"
        )
    for moment in ("yesterday", "2026-11-28 10:00:00", "2026-11-28 10:00:00+00; id"):
        assert "allowed: a time with its offset from UTC" in play(RESTORE, fails=True, restore_time=moment, confirm="yes")
    assert "postgresql_restore_time is empty" in play(RESTORE, fails=True, confirm="yes")
    assert kept() == directories
    assert root("systemctl show --property=ActiveEnterTimestampMonotonic mailroom-web").stdout == started


def test_time_after_the_last_write_keeps_the_old_data(play, root, sql, subjects, now, kept):
    # Without a write after the time, PostgreSQL can't know that it has reached it.
    sql("ALTER SYSTEM SET autovacuum = off")
    root("systemctl reload postgresql@17-main && systemctl stop mailroom.target")
    time.sleep(2)
    known, directories = subjects(), kept()
    output = play(RESTORE, fails=True, restore_time=now(), confirm="yes")
    assert "runs with the old data again" in output and "recovery ended before configured recovery target" in output
    assert subjects() == known and kept() == directories
    sql("ALTER SYSTEM RESET autovacuum")
    root("systemctl reload postgresql@17-main && systemctl start mailroom.target")


def test_run_after_a_killed_one_restores_all_data(send, eventually, play, root, subjects):
    subject, state = send()
    eventually(lambda: state() == "sent")
    # A run that was killed after it had moved the old directory left this state.
    root(f"systemctl stop mailroom.target postgresql@17-main && mv {DATA} {DATA}.replaced-by-a-killed-run")
    root(f"mkdir {DATA}.restored && touch {DATA}.restored/PG_VERSION")
    play(RESTORE, restore_time="latest", confirm="yes")
    assert subject in subjects()
    _, state = send()
    eventually(lambda: state() == "sent", seconds=90)
    root(f"rm -rf {DATA}.replaced-*")
    assert "changed=0 " in play("database")


def test_wrong_password_of_an_existing_repository_fails_the_run(play, root):
    output = play("database", fails=True, postgresql_archive_password="Another-password-1")  # noqa: S106 - of this test
    assert "pgBackRest can't archive to /srv/archive" in output and "Another-password-1" not in output
    play("database")
    assert root("cd / && runuser -u postgres -- pgbackrest --stanza=main check").rc == 0


def test_without_a_repository_nothing_is_archived(play, root, sql):
    play("database", postgresql_archive_repository="")
    assert sql("SHOW archive_mode") == "off"
    assert root("systemctl cat postgresql-base-backup.timer").rc != 0
    play("database")
    assert sql("SHOW archive_mode") == "on"
