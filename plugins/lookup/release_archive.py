"""Packs a project folder into an archive that is named after its content."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: release_archive
short_description: Pack a project folder into an archive that is named after its content
description:
  - Packs a folder on the controller. The archive does not depend on the times and owners of the files. The same content gets the
    same name, so a role can check by the name whether a host already has the release.
options:
  _terms: {description: The folder., required: true}
  exclude: {description: "Names to exclude, as shell patterns.", type: list, elements: str, default: []}
  salt: {description: A string that is part of the hash and so of the name., type: str, default: ""}
author: The maintainers of this bundle (@django-celery)
"""

RETURN = r"""
_raw:
  description: For each folder a dictionary with the release's C(id), 12 hexadecimal digits, and the C(path) of its archive.
  type: list
  elements: dict
"""


def files_of(folder: Path, exclude: list[str]) -> Iterator[Path]:
    """Return the sorted paths of files and symbolic links below a folder, relative to the folder."""
    for directory, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not any(fnmatch.fnmatch(name, p) for p in exclude))
        # os.walk lists a link to a folder as a folder, and does not follow the link.
        files += [name for name in names if os.path.islink(os.path.join(directory, name))]
        for name in sorted(files):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
                yield (Path(directory) / name).relative_to(folder)


def pack(folder: Path, exclude: list[str]) -> bytes:
    """Return the folder's tar archive. The archive depends only on names, content and the executable bit."""
    buffer = io.BytesIO()
    directories = {Path(".")}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files_of(folder, exclude):
            # Without these members, root would own the directories of the unpacked project, and the build could not write to them.
            for directory in reversed(path.parents):
                if directory not in directories:
                    directories.add(directory)
                    parent = tarfile.TarInfo(str(directory))
                    parent.type, parent.mode = tarfile.DIRTYPE, 0o750
                    archive.addfile(parent)
            # A new TarInfo has no time and no owner, and stores hard links as separate files.
            member = tarfile.TarInfo(str(path))
            status = os.lstat(folder / path)
            member.mode = 0o750 if status.st_mode & 0o100 else 0o640
            if stat.S_ISLNK(status.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(folder / path)
                archive.addfile(member)
            elif stat.S_ISREG(status.st_mode):
                member.size = status.st_size
                with open(folder / path, "rb") as file:
                    archive.addfile(member, file)
    return buffer.getvalue()


class LookupModule(LookupBase):
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, str]]:
        self.set_options(var_options=variables, direct=kwargs)
        found = []
        for term in terms:
            folder = Path(os.path.expanduser(term))
            if not folder.is_dir():
                raise AnsibleLookupError(f"{folder} is not a folder on the controller.")
            content = pack(folder, self.get_option("exclude"))
            digest = hashlib.sha256(content + b"\0" + self.get_option("salt").encode()).hexdigest()[:12]
            # Ansible's temporary directory is private to the user. Ansible removes it when the playbook ends.
            path = Path(constants.DEFAULT_LOCAL_TMP) / f"release-{digest}.tar.gz"
            if not path.exists():
                part = path.with_suffix(f".{os.getpid()}")
                part.write_bytes(gzip.compress(content, mtime=0))
                part.rename(path)
            found.append({"id": digest, "path": str(path)})
        return found
