"""Tests the filter that joins the journals of several hosts."""

from __future__ import annotations

import json

from ansible_collections.django_celery.stack.plugins.filter.journal import journal_lines


def entry(time, message, **more):
    return json.dumps({"__REALTIME_TIMESTAMP": str(time), "MESSAGE": message, **more})


def test_lines_of_all_hosts_are_in_the_order_of_their_times():
    web = "\n".join(
        [
            entry(1_000_000, "accepted", _SYSTEMD_UNIT="shop-web.service"),
            entry(3_000_000, "queried", _SYSTEMD_UNIT="shop-web.service"),
        ]
    )
    worker = entry(2_500_000, "sent", _SYSTEMD_UNIT="shop-worker@mail.service")
    assert journal_lines({"web1": web, "idle1": "-- No entries --", "worker1": worker}) == [
        "1970-01-01T00:00:01.000+00:00 web1 shop-web: accepted",
        "1970-01-01T00:00:02.500+00:00 worker1 shop-worker@mail: sent",
        "1970-01-01T00:00:03.000+00:00 web1 shop-web: queried",
    ]


def test_unprintable_messages_are_shown():
    assert journal_lines({"a": entry(0, [104, 105, 255])}) == ["1970-01-01T00:00:00.000+00:00 a -: hi\\xff"]


def test_no_entries_give_no_lines():
    assert journal_lines({"a": "", "b": "-- No entries --"}) == []
