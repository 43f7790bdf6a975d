"""Compares versions of RabbitMQ and Erlang."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# A row of the table of compatible versions: `since`, `erlang` and `paired`.
Row = Mapping[str, Any]


def begins(version: str, prefix: str) -> bool:
    """Return whether a version such as 27.3.4 belongs to the series 27, or a series such as 27 contains the version."""
    ours, theirs = str(version).split("."), str(prefix).split(".")
    length = min(len(ours), len(theirs))
    return ours[:length] == theirs[:length]


def release(version: str) -> tuple[int, ...]:
    """Return a version as numbers. A series counts as its newest release, since a package manager would install that release."""
    numbers = [int(part) for part in str(version).split(".")]
    return (*numbers, 9999)[:3] if len(numbers) == 2 else tuple(numbers)


def series(version: str) -> str:
    """Return the series of a version, such as 4.0 of 4.0.5."""
    return ".".join(version.split(".")[:2])


def upstream(version: str) -> str:
    """Return the version in a package's version, such as 3.10.8 in 3.10.8-1.1+deb12u1, or an empty string if there is none."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return found[1] if found else ""


def compatibility(table: Sequence[Row], rabbitmq: str, erlang: str) -> str:
    """Return `supported`, `paired`, `refused`, or `unknown` if the table lacks the RabbitMQ series."""
    try:
        wanted = release(rabbitmq)
    except ValueError:
        return "unknown"
    for row in table:
        since = release(row["since"])
        if since[:2] == wanted[:2] and since <= wanted:
            if any(begins(erlang, version) for version in row["erlang"]):
                return "supported"
            return "paired" if any(begins(erlang, version) for version in row["paired"]) else "refused"
    return "unknown"
