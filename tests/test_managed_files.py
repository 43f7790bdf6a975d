"""Tests the functions that mark, find, read and write the files of an owner."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from ansible_collections.django_celery.stack.plugins.module_utils import managed_files
from ansible_collections.django_celery.stack.plugins.module_utils.managed_files import (
    FirstLineMarker,
    ManagedFiles,
    PropertyListMarker,
    newest,
    orphans,
    read,
)
from ansible_collections.django_celery.stack.plugins.module_utils.systemd import unit_files

PLIST = '<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict/></plist>\n'


class Module:
    """The part of AnsibleModule that ManagedFiles uses. This machine has no SELinux."""

    def set_default_selinux_context(self, path, changed):
        return changed


def test_modes_do_not_depend_on_the_umask(tmp_path, any_umask):
    path = tmp_path / "a.service.d" / "50-ansible.conf"
    files = ManagedFiles(Module())
    files.write(str(path), "one\n")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    path.chmod(0o600)
    files.write(str(path), "two\n")
    assert (path.stat().st_mode & 0o777, path.read_text()) == (0o644, "two\n")
    assert os.listdir(path.parent) == ["50-ansible.conf"]


def test_note_adds_a_diff_entry_only_for_a_changed_text(tmp_path):
    path = tmp_path / "a"
    files = ManagedFiles(Module())
    assert files.note(str(path), "new\n")
    assert not files.note(str(path), None)
    path.write_text("new\n")
    assert not files.note(str(path), "new\n")
    assert files.note(str(path), None)
    names = {"before_header": str(path), "after_header": str(path)}
    assert files.diff == [{**names, "before": "", "after": "new\n"}, {**names, "before": "new\n", "after": ""}]


def test_orphans_are_the_owners_unwanted_files(tmp_path):
    (tmp_path / "b.service.d").mkdir()
    files = {"wanted.service": "app", "gone.service": "app", "b.service.d/50-ansible.conf": "app", "others.service": "app/two"}
    for name, owner in files.items():
        (tmp_path / name).write_text(FirstLineMarker(owner).put("[Service]\n"))
    (tmp_path / "by-hand.service").write_text("[Service]\n" + str(FirstLineMarker("app")))
    (tmp_path / "dangling.service").symlink_to("/nowhere")
    found = orphans(unit_files(str(tmp_path)), FirstLineMarker("app"), {str(tmp_path / "wanted.service"): ""})
    assert found == [str(tmp_path / "b.service.d/50-ansible.conf"), str(tmp_path / "gone.service")]


def test_foreign_files_may_contain_any_bytes(tmp_path):
    """A property list of another program may be binary, and a manually written unit may be in Latin-1."""
    (tmp_path / "other.plist").write_bytes(b"bplist00\xd1\x01\x02\xff")
    assert orphans([str(tmp_path / "other.plist")], PropertyListMarker("app"), {}) == []


def test_marker_of_a_property_list_is_a_comment_after_the_declaration():
    marker = PropertyListMarker("my--app/web")
    text = marker.put(PLIST)
    assert text.splitlines()[1] == "<!-- Managed by Ansible for my- -app/web -->"
    assert text.startswith("<?xml")
    assert marker.is_in(text)
    assert not PropertyListMarker("my--app/celery").is_in(text)


@pytest.mark.parametrize(("is_file", "time"), [(True, 2000), (False, 1000)])
def test_newest_uses_the_times_of_links_and_of_the_files_that_they_point_to(tmp_path, is_file, time):
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch() if is_file else target.mkdir()
    link.symlink_to(target)
    os.utime(target, (2000, 2000))
    os.utime(link, (1000, 1000), follow_symlinks=False)
    assert newest([str(link), str(tmp_path / "missing")]) == time
    os.utime(link, (3000, 3000), follow_symlinks=False)
    assert newest([str(link)]) == 3000
    assert newest([]) == 0


def test_time_of_a_packaged_file_is_that_of_its_installation(monkeypatch):
    """rpm sets the modification time to the time of the build, which may be years earlier."""
    status = SimpleNamespace(st_mtime=1000, st_ctime=2000, st_mode=0o100644)
    monkeypatch.setattr(managed_files.os, "lstat", lambda path: status)
    monkeypatch.setattr(managed_files.os, "stat", lambda path: status)
    assert newest(["/usr/bin/erl"], ("/usr/",)) == 2000
    assert newest(["/usr/bin/erl"]) == 1000
    assert newest(["/etc/rabbitmq/rabbitmq.conf"], ("/usr/",)) == 1000


def test_missing_file_has_no_text(tmp_path):
    assert read(str(tmp_path / "missing")) is None
