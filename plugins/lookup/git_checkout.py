"""Checks out a version of a git repository on the controller."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible import constants
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: git_checkout
short_description: Check out a version of a git repository on the controller
description:
  - Fetches one version of a repository into Ansible's temporary directory, once per run, and returns the folder without C(.git).
  - The folder can be the C(django_source) of the role C(django), which names a release after its content. So another version with
    the same content creates no new release.
  - Needs git on the controller, and no git on the hosts. Submodules are not fetched.
options:
  _terms:
    description: The repository, as an SSH address, a URL without a password, or a path.
    required: true
  version:
    description: A branch, a tag, or the full hash of a commit, if the server allows clients to fetch it.
    type: str
    required: true
  key_file:
    description: The private SSH key on the controller that may read the repository. The default is the user's SSH configuration.
    type: str
    default: ""
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
django_source: "{{ lookup('django_celery.stack.git_checkout', 'git@git.example.org:shop.git', version='v1.4') }}"
"""

RETURN = r"""
_raw:
  description: The folder of each repository.
  type: list
  elements: path
"""


def git(*arguments: str, **environment: str) -> None:
    """Run git, which fails if it needs a password. Raises AnsibleLookupError with git's error."""
    variables = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **environment}
    done = subprocess.run(["git", *arguments], env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AnsibleLookupError(done.stderr.strip())


def checkout(repository: str, version: str, key_file: str) -> Path:
    """Return the folder with a version of a repository. The first call of a run fetches it."""
    if "://" in repository and urlsplit(repository).password:
        # git's command line would contain the password.
        raise AnsibleLookupError("git_checkout: the repository's URL contains a password. Use a deploy key (key_file) instead.")
    key = Path(os.path.expanduser(key_file))
    if key_file and not key.is_file():
        raise AnsibleLookupError(f"git_checkout: the key_file {key_file} is not a file on the controller.")
    digest = hashlib.sha256("\0".join((repository, version)).encode()).hexdigest()[:12]
    folder = Path(constants.DEFAULT_LOCAL_TMP) / f"checkout-{digest}"
    if folder.is_dir():
        return folder
    part = Path(tempfile.mkdtemp(prefix="checkout-", dir=constants.DEFAULT_LOCAL_TMP))
    ssh = ["ssh", "-o", "BatchMode=yes", *(["-i", str(key), "-o", "IdentitiesOnly=yes"] if key_file else [])]
    try:
        git("init", "--quiet", str(part))
        git("-C", str(part), "fetch", "--quiet", "--depth=1", "--", repository, version, GIT_SSH_COMMAND=shlex.join(ssh))
        git("-C", str(part), "checkout", "--quiet", "FETCH_HEAD")
        shutil.rmtree(part / ".git")
        part.rename(folder)
    except AnsibleLookupError as error:
        raise AnsibleLookupError(f"git_checkout: {version} of {repository} can't be fetched: {error}") from None
    except OSError:
        # Another process of this run has already fetched this version.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


class LookupModule(LookupBase):
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        self.set_options(var_options=variables, direct=kwargs)
        return [str(checkout(term, self.get_option("version"), self.get_option("key_file"))) for term in terms]
