"""Joins entries of the journals of several hosts."""

from __future__ import annotations

import json
from datetime import UTC, datetime


def journal_lines(outputs):
    """Return one line per entry, oldest first: the time, the host, the unit and the message.

    `outputs` maps hosts to the output of `journalctl --output=json`, which has one JSON object per line.
    """
    entries = [(host, json.loads(line)) for host, output in outputs.items() for line in output.splitlines() if line.startswith("{")]
    entries.sort(key=lambda each: int(each[1]["__REALTIME_TIMESTAMP"]))
    return [
        f"{_time(entry)} {host} {entry.get('_SYSTEMD_UNIT', '-').removesuffix('.service')}: {_text(entry['MESSAGE'])}"
        for host, entry in entries
    ]


def _time(entry):
    microseconds = int(entry["__REALTIME_TIMESTAMP"])
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="milliseconds")


def _text(message):
    """journalctl writes a message with unprintable characters as a list of bytes."""
    return message if isinstance(message, str) else bytes(message).decode(errors="backslashreplace")


class FilterModule:
    def filters(self):
        return {"journal_lines": journal_lines}
