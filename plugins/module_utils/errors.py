"""The error that a module of this collection reports to the person who runs the playbook."""

from __future__ import annotations


class Failure(Exception):
    """The host cannot be brought to the wanted state. The text is a full sentence, which `fail_json` prints."""
