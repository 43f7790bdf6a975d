"""Tests the pure function for the next step after an attempt, with a table of cases."""

import pytest

from emails.outcomes import longest_wait, next_step
from emails.states import State

SENT, FAILED, DEFERRED, UNCERTAIN = State.SENT, State.FAILED, State.DEFERRED, State.UNCERTAIN
DAY = 86400.0


@pytest.mark.parametrize(
    ("result", "policy", "attempts", "left", "jitter", "expected"),
    [
        (SENT, "resend", 1, DAY, 0.5, (SENT, None, "")),
        (SENT, "hold", 9, -5, 0.5, (SENT, None, "")),
        (FAILED, "resend", 1, DAY, 0.5, (FAILED, None, "server")),
        (FAILED, "hold", 1, -5, 0.5, (FAILED, None, "server")),
        # The wait is in the second half of a range that doubles, up to an hour.
        (DEFERRED, "resend", 1, DAY, 0.0, (DEFERRED, 15.0, "")),
        (DEFERRED, "resend", 1, DAY, 1.0, (DEFERRED, 30.0, "")),
        (DEFERRED, "resend", 2, DAY, 0.0, (DEFERRED, 30.0, "")),
        (DEFERRED, "hold", 3, DAY, 0.5, (DEFERRED, 90.0, "")),
        (DEFERRED, "resend", 50, DAY, 1.0, (DEFERRED, 3600.0, "")),
        # The next attempt may start exactly at the deadline, but not after it.
        (DEFERRED, "resend", 1, 30.0, 1.0, (DEFERRED, 30.0, "")),
        (DEFERRED, "resend", 1, 29.9, 1.0, (FAILED, None, "deadline")),
        (UNCERTAIN, "resend", 1, DAY, 0.0, (UNCERTAIN, 15.0, "")),
        (UNCERTAIN, "resend", 1, 15.0, 0.0, (UNCERTAIN, 15.0, "")),
        (UNCERTAIN, "resend", 1, 14.9, 0.0, (UNCERTAIN, None, "")),
        (UNCERTAIN, "hold", 1, DAY, 0.0, (UNCERTAIN, None, "")),
    ],
)
def test_next_step(result, policy, attempts, left, jitter, expected):
    step = next_step(
        result,
        attempts=attempts,
        seconds_left=left,
        policy=policy,
        retry_seconds=30.0,
        jitter=jitter,
    )
    assert (step.state, step.wait, step.failed_by) == expected


def test_longest_wait_doubles_up_to_an_hour():
    waits = [longest_wait(attempts, 30.0) for attempts in (0, 1, 2, 3, 8, 1000)]
    assert waits == [30, 30, 60, 120, 3600, 3600]
