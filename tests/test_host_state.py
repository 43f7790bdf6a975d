"""Tests the module that compares and corrects the users, directories and files of a role."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils import host_state
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.host_state import HostState
from ansible_collections.django_celery.stack.plugins.modules import host_state as host_state_module
from helpers import executable

ME, GROUP = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name


def state(check=False, **wanted):
    """The HostState object after a run with these options."""
    options = {"users": [], "directories": [], "files": [], "packages": {}, "look_at": [], "requires": []}
    warnings = []
    module = SimpleNamespace(
        params=options | wanted, check_mode=check, set_default_selinux_context=lambda path, changed: changed, warn=warnings.append
    )
    host = HostState(module)
    host.warnings = warnings
    host.run()
    return host


def entry(path, mode="0640", **more):
    return {"path": str(path), "owner": ME, "group": GROUP, "mode": mode, **more}


def file_entry(path, content=None, mode="0640", **more):
    return entry(path, mode, **{"content": content, "secret_content": None, "staged": False, **more})


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ---- Directories ----


def test_directory_is_created_with_its_mode(tmp_path, any_umask):
    path = tmp_path / "parent" / "a"
    assert state(directories=[entry(path, "2750")]).result["changed"]
    assert mode(path) == 0o2750
    assert not state(directories=[entry(path, "2750")]).result["changed"]


def test_mode_of_a_directory_is_corrected(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(0o777)
    host = state(directories=[entry(path, "0750")])
    assert mode(path) == 0o750
    (diff,) = host.diff
    assert (diff["before"]["mode"], diff["after"]["mode"]) == ("0777", "0750")


def test_directory_without_a_group_keeps_its_own(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(path, -1, 1)
    assert not state(directories=[entry(path, "0750", group=None)]).result["changed"]


def test_file_instead_of_a_directory_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(Failure, match=r"/a must be a directory, but is not"):
        state(directories=[entry(tmp_path / "a")])


# ---- Files ----


def test_file_is_written_once(tmp_path, any_umask):
    path = tmp_path / "a"
    host = state(files=[file_entry(path, "text\n")])
    assert (path.read_text(), mode(path)) == ("text\n", 0o640)
    assert host.diff == [{"before_header": str(path), "after_header": str(path), "before": "", "after": "text\n"}]
    assert os.listdir(tmp_path) == ["a"]
    before = path.stat()
    host = state(files=[file_entry(path, "text\n")])
    assert (host.result["changed"], host.diff) == (False, [])
    # A service restarts when a file is newer than its process, so the module must not touch an unchanged file.
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_mode_of_a_file_is_corrected_without_writing_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("text\n")
    path.chmod(0o666)
    before = path.stat().st_mtime_ns
    assert state(files=[file_entry(path, "text\n")]).result["changed"]
    assert (mode(path), path.stat().st_mtime_ns) == (0o640, before)


def test_secret_is_in_no_diff(tmp_path):
    path = tmp_path / "a"
    path.write_text("old-secret\n")
    host = state(files=[file_entry(path, **{"secret_content": "new-secret\n"})])
    assert path.read_text() == "new-secret\n"
    assert host.result["changed"]
    assert "old-secret" not in repr(host.result) and "new-secret" not in repr(host.result)


def test_new_file_is_private_before_its_text_is_written(tmp_path, monkeypatch):
    """A reader who opens the temporary file early must not see a secret that is written later."""
    path, seen = tmp_path / "a", []
    fchmod = os.fchmod
    monkeypatch.setattr(os, "fchmod", lambda fd, bits: seen.append(stat.S_IMODE(os.fstat(fd).st_mode)) or fchmod(fd, bits))
    state(files=[file_entry(path, mode="0600", **{"secret_content": "secret\n"})])
    assert seen == [0o600]


def test_staged_file_stays_until_the_role_moves_it(tmp_path):
    path, new = tmp_path / "a", tmp_path / "a.new"
    path.write_text("old\n")
    path.chmod(0o640)
    host = state(files=[file_entry(path, "new\n", staged=True)])
    assert (path.read_text(), new.read_text(), mode(new)) == ("old\n", "new\n", 0o640)
    assert host.result["staged"] == [str(path)]
    assert state(files=[file_entry(path, "new\n", staged=True)]).result["staged"] == [str(path)]
    os.replace(new, path)
    assert state(files=[file_entry(path, "new\n", staged=True)]).result["staged"] == []


def test_staged_file_that_is_no_longer_wanted_is_removed(tmp_path):
    path, new = tmp_path / "a", tmp_path / "a.new"
    for each in (path, new):
        each.write_text("old\n" if each == path else "secret of a run that was killed\n")
    state(files=[file_entry(path, "old\n", staged=True)])
    assert not new.exists()


@pytest.mark.parametrize("key", ["owner", "group"])
def test_unknown_owner_is_refused(tmp_path, key):
    with pytest.raises(Failure, match=rf"/a: the {key} nobody-of-this-name does not exist"):
        state(files=[{**file_entry(tmp_path / "a", "text\n"), key: "nobody-of-this-name"}])


def test_owner_may_be_a_number(tmp_path):
    state(files=[file_entry(tmp_path / "a", "text\n", owner=str(os.getuid()), group=str(os.getgid()))])
    assert (tmp_path / "a").stat().st_uid == os.getuid()


# ---- Users ----


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Replaces useradd and usermod with programs that write their arguments to a file."""
    log = tmp_path / "log"
    for name in ("useradd", "usermod"):
        executable(
            tmp_path / "bin" / name, f"import sys\nopen({str(log)!r}, 'a').write(' '.join([{name!r}, *sys.argv[1:]]) + '\\n')\n"
        )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda: log.read_text().splitlines() if log.exists() else []


def passwd(monkeypatch, **users):
    def getpwnam(name):
        if name not in users:
            raise KeyError(name)
        home, shell = users[name]
        return SimpleNamespace(pw_uid=990, pw_dir=home, pw_shell=shell)

    monkeypatch.setattr(host_state.pwd, "getpwnam", getpwnam)


APP = {"name": "app", "home": "/var/lib/app", "group": None}


def test_missing_user_is_created_without_a_login(monkeypatch, programs):
    passwd(monkeypatch)
    assert state(users=[APP]).result["changed"]
    assert programs() == ["useradd --system --no-create-home --home-dir /var/lib/app --shell /usr/sbin/nologin app"]


def test_group_of_that_name_becomes_the_users_group(monkeypatch, programs):
    passwd(monkeypatch)
    monkeypatch.setattr(host_state.grp, "getgrnam", lambda name: SimpleNamespace(gr_gid=990))
    state(users=[APP])
    assert programs() == ["useradd --system --no-create-home --home-dir /var/lib/app --shell /usr/sbin/nologin --gid app app"]


def test_user_gets_the_listed_group(monkeypatch, programs):
    passwd(monkeypatch)
    state(users=[{**APP, "group": "web"}])
    assert programs() == ["useradd --system --no-create-home --home-dir /var/lib/app --shell /usr/sbin/nologin --gid web app"]


@pytest.mark.parametrize("found", [("/root", "/usr/sbin/nologin"), ("/var/lib/app", "/bin/bash")])
def test_user_with_another_home_or_shell_is_corrected(monkeypatch, programs, found):
    passwd(monkeypatch, app=found)
    assert state(users=[APP]).result["changed"]
    assert programs() == ["usermod --home /var/lib/app --shell /usr/sbin/nologin app"]


def test_user_that_matches_the_list_is_not_changed(monkeypatch, programs):
    passwd(monkeypatch, app=("/var/lib/app", "/usr/sbin/nologin"))
    assert not state(users=[APP]).result["changed"]
    assert programs() == []


def test_error_of_useradd_is_shown(monkeypatch, programs, tmp_path):
    passwd(monkeypatch)
    executable(tmp_path / "bin" / "useradd", "import sys\nsys.exit('useradd: cannot lock /etc/passwd')\n")
    with pytest.raises(Failure, match="cannot lock /etc/passwd"):
        state(users=[APP])


# ---- The module ----


@pytest.mark.parametrize(("path", "words"), [("a", {"changed": True}), ("a/b", {"failed": True, "changed": True})])
def test_module_prints_its_result(tmp_path, capsys, path, words):
    with patch_module_args({"files": [entry(tmp_path / path, content="text\n")]}), pytest.raises(SystemExit):
        host_state_module.main()
    result = json.loads(capsys.readouterr().out)
    assert words.items() <= result.items()
    assert result["packages_missing"] == []


def test_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        state(files=[file_entry(tmp_path / "a", "text\n")])
    assert os.listdir(tmp_path) == []


# ---- Check mode ----


def test_check_mode_on_an_empty_host_changes_nothing(tmp_path, monkeypatch, programs):
    passwd(monkeypatch)
    host = state(
        check=True,
        users=[APP],
        directories=[entry(tmp_path / "a", owner="app", group="app")],
        files=[file_entry(tmp_path / "a" / "b", "text\n", owner="app", group="app", staged=True)],
    )
    assert host.result["changed"]
    assert [each["before_header"] for each in host.diff] == ["user app", str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert not (tmp_path / "a").exists()
    assert programs() == []


def test_check_mode_reports_attributes(tmp_path):
    path = tmp_path / "a"
    path.write_text("text\n")
    path.chmod(0o666)
    assert state(check=True, files=[file_entry(path, "text\n")]).result["changed"]
    assert mode(path) == 0o666


# ---- Packages and paths ----


@pytest.fixture
def dpkg(tmp_path, monkeypatch):
    """A dpkg-query for a host with two packages, and with the configuration of a removed package."""
    text = "rabbitmq-server\\tinstalled\\t4.0.5-6\\nerlang-base\\tinstalled\\t1:27.3.4-1\\nold\\tconfig-files\\t1.0-1\\n"
    executable(
        tmp_path / "bin" / "dpkg-query", f"import sys\nprint({text!r}.encode().decode('unicode_escape'), end='')\nsys.exit(1)\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "debian_version").write_text("13.2\n")
    monkeypatch.setattr(host_state, "DEBIAN", str(tmp_path / "debian_version"))


def test_packages_of_another_version_are_missing(dpkg):
    wanted = {"rabbitmq-server": "4[.]0[.]", "erlang-base": "1:26[.]", "old": "", "never": ""}
    result = state(packages=wanted).result
    assert result["packages_missing"] == ["erlang-base", "old", "never"]
    assert result["packages"] == {"rabbitmq-server": "4.0.5-6", "erlang-base": "1:27.3.4-1"}


def test_packages_of_rpm(tmp_path, monkeypatch):
    text = "erlang\tinstalled\t27.3.4\npackage never is not installed\n"
    executable(tmp_path / "bin" / "rpm", f"import sys\nprint({text!r}, end='')\nsys.exit(1)\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(host_state, "DEBIAN", "/nowhere")
    assert state(packages={"erlang": "27([.]|$)", "never": ""}).result["packages_missing"] == ["never"]
    assert state(packages={"erlang": "2([.]|$)"}).result["packages_missing"] == ["erlang"]


def test_program_that_holds_the_lock_of_dpkg_is_named(dpkg, tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    monkeypatch.setattr(host_state, "DPKG_LOCK", str(lock))
    assert state(packages={"never": ""}).warnings == []
    lock.write_text("")
    assert state(packages={"never": ""}).warnings == []
    held = "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", held, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        (sentence,) = state(packages={"never": ""}).warnings
        assert f" (process {process.pid}) holds the lock of dpkg on {os.uname().nodename}. The installation waits" in sentence
        # No warning in check mode or if the package is already installed, because nothing will be installed.
        assert state(check=True, packages={"never": ""}).warnings == []
        assert state(packages={"erlang-base": "1:27"}).warnings == []
        process.communicate("\n")


def test_existing_paths_and_targets_of_links_are_reported(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "release")
    (tmp_path / "dangling").symlink_to("/nowhere")
    names = [str(tmp_path / name) for name in ("release", "current", "dangling", "never")]
    result = state(look_at=names).result
    assert list(result["exists"].values()) == [True, True, False, False]
    assert result["links"] == {names[1]: str(tmp_path / "release"), names[2]: "/nowhere"}


def test_nothing_is_written_without_a_required_path(tmp_path):
    wanted = {"files": [file_entry(tmp_path / "a", "text\n")], "requires": [str(tmp_path / "conf.d")]}
    result = state(**wanted).result
    assert (result["applied"], result["changed"], (tmp_path / "a").exists()) == (False, False, False)
    (tmp_path / "conf.d").mkdir()
    assert state(**wanted).result["applied"]
    assert (tmp_path / "a").exists()
