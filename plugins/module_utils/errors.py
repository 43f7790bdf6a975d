"""The error that modules of this collection report to the person who runs the playbook."""

from __future__ import annotations


class Failure(Exception):
    """A module can't reach the wanted state. The text is a full sentence, which `fail_json` prints."""
