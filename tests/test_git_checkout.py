"""Tests the lookup git_checkout with repositories on this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.loader import lookup_loader
from helpers import MARK, executable


def git(folder, *arguments):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the tag v1 and a newer commit on main. Each test is a separate run of Ansible."""
    local = tmp_path / "ansible"
    local.mkdir()
    monkeypatch.setattr(constants, "DEFAULT_LOCAL_TMP", str(local))
    folder = tmp_path / "shop"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", folder], check=True)
    for number, tag in ((1, "v1"), (2, "v2")):
        (folder / "manage.py").write_text(f"# {number}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", f"--message={number}")
        git(folder, "tag", tag)
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    return folder


def checked_out(repository, version, **options):
    (folder,) = lookup_loader.get("django_celery.stack.git_checkout").run([str(repository)], version=version, **options)
    return Path(folder)


@pytest.mark.parametrize(("version", "text"), [("main", "# 2\n"), ("v1", "# 1\n"), ("commit", "# 1\n")])
def test_version_is_checked_out_without_the_history(repository, version, text):
    folder = checked_out(repository, git(repository, "rev-parse", "v1") if version == "commit" else version)
    assert [path.name for path in folder.iterdir()] == ["manage.py"]
    assert (folder / "manage.py").read_text() == text
    assert list(folder.parent.iterdir()) == [folder]


def test_repository_is_fetched_once_per_run(repository):
    before = checked_out(repository, "main")
    assert checked_out(repository, "v1") != before
    repository.rename(repository.with_name("moved"))
    assert checked_out(repository, "main") == before


def test_missing_version_is_named(repository):
    with pytest.raises(AnsibleLookupError, match=r"v9 of .*shop can't be fetched: .*v9"):
        checked_out(repository, "v9")
    assert list(Path(constants.DEFAULT_LOCAL_TMP).iterdir()) == []


def test_version_is_no_option_of_git(repository, tmp_path):
    with pytest.raises(AnsibleLookupError):
        checked_out(repository, f"--upload-pack=touch {tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_password_in_the_url_is_refused_and_not_shown(repository):
    with pytest.raises(AnsibleLookupError, match="Use a deploy key") as error:
        checked_out(f"https://user:{MARK}@git.invalid/shop.git", "main")
    assert MARK not in str(error.value)


def test_deploy_key_is_the_only_key_that_ssh_offers(repository, tmp_path, monkeypatch):
    """The stand-in for ssh records its arguments, and runs the command of git on this machine."""
    record = f"open({str(tmp_path / 'ssh')!r}, 'w').write(' '.join(sys.argv[1:]))"
    executable(tmp_path / "bin" / "ssh", f"import os, sys\n{record}\nos.execvp('sh', ['sh', '-c', sys.argv[-1]])\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    key = tmp_path / "a key"
    with pytest.raises(AnsibleLookupError, match="is not a file on the controller"):
        checked_out(f"ssh://git@localhost{repository}", "v1", key_file=str(key))
    key.touch()
    folder = checked_out(f"ssh://git@localhost{repository}", "v1", key_file=str(key))
    assert (folder / "manage.py").read_text() == "# 1\n"
    assert f"-o BatchMode=yes -i {key} -o IdentitiesOnly=yes" in (tmp_path / "ssh").read_text()
