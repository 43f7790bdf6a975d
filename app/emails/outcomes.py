"""The next state after an attempt: pure functions, without the database and the mail server."""

from dataclasses import dataclass

from emails.states import FailedBy, State

LONGEST_RETRY_SECONDS = 3600.0
LARGEST_EXPONENT = 16


@dataclass(frozen=True)
class Step:
    """The state after an attempt, and the seconds until the next one, or None."""

    state: State
    wait: float | None
    failed_by: str = ""


def longest_wait(attempts: int, retry_seconds: float) -> float:
    """The longest wait after this attempt in seconds. It doubles per attempt, up to an hour."""
    doubled = retry_seconds * 2.0 ** min(max(attempts, 1) - 1, LARGEST_EXPONENT)
    return min(doubled, LONGEST_RETRY_SECONDS)


def next_step(
    result: State,
    *,
    attempts: int,
    seconds_left: float,
    policy: str,
    retry_seconds: float,
    jitter: float,
) -> Step:
    """The next step after an attempt with the result sent, failed, deferred or uncertain.

    `seconds_left` is the time until the deadline, `jitter` a random number from 0 to 1. The wait is
    at least half of the longest wait. Shorter waits would use up the early, quick retries while the
    server is still down.
    """
    if result == State.SENT:
        return Step(State.SENT, None)
    if result == State.FAILED:
        return Step(State.FAILED, None, FailedBy.SERVER)
    wait = longest_wait(attempts, retry_seconds) * (0.5 + jitter / 2)
    if result == State.DEFERRED:
        if wait > seconds_left:
            return Step(State.FAILED, None, FailedBy.DEADLINE)
        return Step(State.DEFERRED, wait)
    if policy == "hold" or wait > seconds_left:
        return Step(State.UNCERTAIN, None)
    return Step(State.UNCERTAIN, wait)
