"""Tests which releases of an application stay on a host."""

from __future__ import annotations

import json
import os

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.django_celery.stack.plugins.module_utils import releases
from ansible_collections.django_celery.stack.plugins.modules import old_releases


@pytest.fixture
def host(tmp_path):
    """A host with the complete releases a to e, and the incomplete releases x and y. e was activated last."""
    for number, name in enumerate("abcdexy"):
        release = tmp_path / "releases" / name
        (release / "venv").mkdir(parents=True)
        if name < "x":
            (release / ".complete").touch()
            os.utime(release / ".complete", (number, number))
        (tmp_path / "environments").mkdir(exist_ok=True)
        (tmp_path / "environments" / name).touch()
    (tmp_path / "environments" / "a.previous").touch()
    return tmp_path


def remove(host, current="e", kept=3, check=False):
    paths = str(host / "releases"), str(host / "environments"), str(host / "releases" / current)
    return releases.remove_old(*paths, kept, check)


def left(host, folder="releases"):
    return "".join(sorted(path.name for path in (host / folder).iterdir()))


def test_only_complete_releases_are_counted(host):
    assert remove(host) == {"removed": ["a", "b", "x", "y"], "complete": ["e", "d", "c"]}
    assert left(host) == left(host, "environments") == "cde"


def test_release_that_was_never_activated_is_not_counted(host):
    """The environment of that release is still staged, because the application rejected the release."""
    (host / "environments" / "e").rename(host / "environments" / "e.new")
    assert remove(host, current="d", kept=2) == {"removed": ["a", "b", "e", "x", "y"], "complete": ["d", "c"]}
    assert left(host, "environments") == "cd"


def test_current_release_stays_if_another_one_was_activated_later(host):
    assert remove(host, current="a", kept=2)["complete"] == ["e", "a"]
    assert left(host) == "ae"
    # If the workers do not work with the new environment of the current release, the run returns to the previous file.
    assert left(host, "environments") == "".join(["a", "a.previous", "e"])


def test_previous_environment_of_another_release_is_removed(host):
    """This file can contain secrets that are no longer valid."""
    assert remove(host, current="e", kept=5)["complete"] == ["e", "d", "c", "b", "a"]
    assert left(host, "environments") == "abcde"


def test_private_environments_stay_with_their_release(host):
    for name in ("a.worker", "e.worker", "e.worker.new", "e.worker.previous", "d.worker.previous", "x.worker"):
        (host / "environments" / name).touch()
    remove(host, kept=2)
    assert sorted(path.name for path in (host / "environments").iterdir()) == ["d", "e", "e.worker", "e.worker.previous"]


def test_check_mode_removes_nothing(host):
    assert remove(host, check=True)["removed"] == ["a", "b", "x", "y"]
    assert left(host) == "abcdexy"
    assert len(left(host, "environments")) == len("abcdexya.previous")


def test_release_that_a_process_uses_stays(host, monkeypatch, tmp_path):
    """One process works in a release; another has mapped a file of a release and works elsewhere."""
    proc, folder = tmp_path / "proc", str(host / "releases")
    for number, (cwd, maps) in enumerate([(f"{folder}/a", ""), ("/", f"7f00-7f01 r-xp 00000000 00:01 5   {folder}/b/venv/x.so\n")]):
        (proc / str(number + 1)).mkdir(parents=True)
        (proc / str(number + 1) / "cwd").symlink_to(cwd)
        (proc / str(number + 1) / "maps").write_text(maps)
    # This process has ended.
    (proc / "99").mkdir()
    assert releases.used_releases(folder, str(proc)) == {f"{folder}/a", f"{folder}/b"}
    monkeypatch.setattr(releases, "used_releases", lambda directory: {f"{folder}/a"})
    assert "a" not in remove(host)["removed"]
    assert left(host) == "acde"


def test_link_in_a_release_is_removed_and_not_followed(host, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (host / "releases" / "x" / "link").symlink_to(tmp_path / "kept")
    remove(host)
    assert (tmp_path / "kept" / "file").exists()


def test_module_prints_its_result(host, capsys):
    options = {"directory": str(host / "releases"), "environments": str(host / "environments"), "kept": 5}
    for changed in (True, False):
        with patch_module_args({**options, "current": str(host / "releases" / "e")}), pytest.raises(SystemExit):
            old_releases.main()
        assert json.loads(capsys.readouterr().out)["changed"] is changed
