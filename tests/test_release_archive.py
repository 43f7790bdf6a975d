"""Tests which changes create a new release: the lookup release_archive."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleLookupError
from ansible.plugins.loader import lookup_loader
from helpers import ROOT


def release(folder, **options):
    """The release of a folder: its id and the bytes of its archive."""
    (found,) = lookup_loader.get("django_celery.stack.release_archive").run([str(folder)], **options)
    return found["id"], Path(found["path"]).read_bytes()


def members(folder, **options):
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(release(folder, **options)[1]))) as archive:
        return {member.name: member for member in archive.getmembers()}


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "mail/.git").mkdir(parents=True)
    (folder / "mail/tests").mkdir()
    files = ("manage.py", "mail/views.py", "mail/views.pyc", "mail/.git/config", "mail/tests/test_views.py")
    for name in files:
        (folder / name).write_text(f"# {name}\n")
        (folder / name).chmod(0o644)
    (folder / "manage.py").chmod(0o755)
    (folder / "latest").symlink_to("mail/views.py")
    (folder / "templates").symlink_to("mail")
    return folder


def test_release_does_not_depend_on_times_modes_and_hard_links(project, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(project, other, symlinks=True)
    for number, path in enumerate(sorted(other.rglob("*"))):
        os.utime(path, (number, number), follow_symlinks=False)
    (other / "mail/views.py").chmod(0o600)
    (other / "manage.py").chmod(0o700)
    # One folder has copies, the other has hard links.
    for folder, make in ((project, shutil.copy), (other, os.link)):
        make(folder / "mail/views.py", folder / "mail/same.py")
        (folder / "mail/same.py").chmod(0o600)
    (other / "empty").mkdir()
    assert release(project) == release(other)


def test_archive_has_no_owners(project):
    if os.geteuid() == 0:
        before = release(project)
        os.chown(project / "manage.py", 1234, 1234)
        assert release(project) == before
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members(project).values()} == {(0, 0, "", "", 0)}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "manage.py").write_text("# other\n"),
        lambda folder: (folder / "mail/views.py").chmod(0o755),
        lambda folder: (folder / "mail/views.py").rename(folder / "mail/other.py"),
        lambda folder: (folder / "latest").unlink(),
        lambda folder: ((folder / "latest").unlink(), (folder / "latest").symlink_to("manage.py")),
        lambda folder: (folder / "templates").unlink(),
        lambda folder: (folder / "new").write_text(""),
    ],
    ids=["content", "executable bit", "name", "no link", "other link", "no link to a folder", "new file"],
)
def test_changed_content_is_a_new_release(project, change):
    before = release(project)
    change(project)
    after = release(project)
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_salt_changes_the_release_id(project):
    plain, salted = release(project), release(project, salt="python3.13")
    assert plain[0] != salted[0]
    assert plain[1] == salted[1]


def test_excluded_files_do_not_affect_the_release(project):
    exclude = [".git", "*.pyc", "tests"]
    assert sorted(members(project, exclude=exclude)) == ["latest", "mail", "mail/views.py", "manage.py", "templates"]
    before = release(project, exclude=exclude)
    (project / "mail/tests/test_more.py").write_text("")
    (project / "mail/other.pyc").write_text("")
    assert release(project, exclude=exclude) == before


def test_files_of_tools_do_not_affect_the_release(tmp_path):
    """Files that the application's .gitignore lists. Its tests may create them while Ansible converges a host."""
    exclude = yaml.safe_load((ROOT / "roles/django/defaults/main.yml").read_text())["django_source_exclude"]
    left = (ROOT / "app/.gitignore").read_text().split()
    (tmp_path / "manage.py").write_text("")
    before = release(tmp_path, exclude=exclude)
    assert left
    for name in left:
        path = tmp_path / name.strip("/").replace("*", "-wal")
        if name.endswith("/"):
            path.mkdir()
            path /= "file"
        path.write_text("")
    assert release(tmp_path, exclude=exclude) == before


def test_archive_contains_each_directory_before_its_files(project):
    (project / "mail/locale/de").mkdir(parents=True)
    (project / "mail/locale/de/django.po").touch()
    found = members(project, exclude=[".git", "tests"])
    names = list(found)
    for name in ("mail", "mail/locale", "mail/locale/de"):
        assert (found[name].isdir(), found[name].mode) == (True, 0o750)
        assert names.index(name) < min(names.index(other) for other in names if other.startswith(f"{name}/"))
    assert len(names) == len(set(names))


def test_file_modes_are_normalized(project):
    modes = {name: oct(member.mode) for name, member in members(project).items() if member.isreg()}
    assert modes["manage.py"] == "0o750"
    assert modes["mail/views.py"] == "0o640"


def test_id_is_short_and_in_the_archives_name(project):
    (found,) = lookup_loader.get("django_celery.stack.release_archive").run([str(project)])
    assert len(found["id"]) == 12
    assert int(found["id"], 16) >= 0
    assert Path(found["path"]).name == f"release-{found['id']}.tar.gz"


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(AnsibleLookupError, match=r"nowhere is not a folder on the controller"):
        release(tmp_path / "nowhere")
