"""The state machine of deliveries: emails/sql/deliveries.sql as functions.

Relay: lease, then publish, or release if that failed. Worker: claim, then begin just before the
message goes to the mail server, then record.
"""

import json
import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from emails import pacing
from emails.conf import conf
from emails.delivery_records import Claimed, Ended, Lease, Leased
from emails.models import Counter
from emails.outcomes import LONGEST_RETRY_SECONDS, Step, next_step
from emails.queries import execute, fetch, load
from emails.states import State

SQL = load("deliveries.sql")

# A published message may wait behind others; after this the delivery is published again.
PUBLISHED_LEASE = timedelta(minutes=10)
# A publication that no worker got within this time, though the queue is empty, is lost.
LOST_AFTER = timedelta(seconds=30)
# So is one that was overtaken by what was published so much later.
OVERTAKEN_BY = timedelta(seconds=60)
REQUEUE_BATCH = 1000
BEGINNING_OF_TIME = datetime(1970, 1, 1, tzinfo=UTC)
ANSWER_LENGTH = 500


def following(result: State, *, attempts: int, seconds_left: float) -> Step:
    """What follows the result of an attempt, by the settings."""
    return next_step(
        result,
        attempts=attempts,
        seconds_left=seconds_left,
        policy=conf.UNCERTAIN_POLICY,
        retry_seconds=conf.RETRY_SECONDS,
        jitter=random.random(),  # noqa: S311 - spreads load, hides nothing
    )


# ---- Relay ----


def is_due(floor: datetime = BEGINNING_OF_TIME) -> bool:
    """Whether a delivery is due since `floor` or later."""
    found: bool = fetch(SQL["due_exists"], {"floor": floor}, prepare=False)[0][0]
    return found


def lease(most: int, floor: datetime = BEGINNING_OF_TIME) -> Lease:
    """Takes up to `most` deliveries that are due since `floor` or later for publishing.

    On the way it fails those whose deadline passed, and ends attempts whose worker is gone.
    """
    with pacing.allowances() as allowed:
        values = {
            "most": most,
            "floor": floor,
            "lease": PUBLISHED_LEASE,
            "closed_domains": allowed.closed,
            "allowances": json.dumps(allowed.by_domain),
            "allowance": allowed.others,
        }
        # Planned each time: a plan for an empty table would read a full one from end to end.
        rows = fetch(SQL["lease"], values, prepare=False)
        allowed.spend([row[5] for row in rows if row[1]])
    taken = Lease()
    if rows:
        taken = Lease(found=len(rows), reached=rows[-1][2], published_at=rows[-1][-1])
    abandoned, late = [], []
    for pk, leased, _, email_id, request_id, _, state, attempts, data_sent, _, *times in rows:
        since, left, _ = times
        if leased:
            taken.deliveries.append(Leased(pk, email_id, request_id))
        elif state == State.SENDING:
            abandoned.append(_abandoned(pk, attempts, data_sent, since or 0, left))
        elif left <= 0:
            late.append(pk)
    if abandoned:
        record(abandoned)
    if late:
        _count("expire", {"ids": late})
    return taken


def _abandoned(pk: int, number: int, data_sent: bool, seconds: float, left: float) -> Ended:
    if data_sent:
        result, answer = State.UNCERTAIN, "The worker was lost while it sent the message."
    else:
        result, answer = State.DEFERRED, "The worker was lost before it sent the message."
    step = following(result, attempts=number, seconds_left=max(left, 0))
    if step.state == State.DEFERRED:
        step = Step(State.DEFERRED, 0)  # nothing is wrong with the mail server
    return Ended(pk, number, step, None, answer, max(seconds, 0))


def release(lease: Lease) -> None:
    """Ends the leases of what was not published, unless somebody else has them by now."""
    if lease.deliveries:
        ids = [delivery.id for delivery in lease.deliveries]
        _count("release", {"ids": ids, "published_at": lease.published_at})


def is_waiting_for_worker() -> bool:
    """Whether a delivery was published so long ago that its publication may be lost."""
    values = {"published_lease": PUBLISHED_LEASE, "lost_after": LOST_AFTER}
    found: bool = fetch(SQL["published_exists"], values, prepare=False)[0][0]
    return found


def requeue_lost(queue_is_empty: bool) -> int:
    """Has the relay publish again what RabbitMQ confirmed and lost; returns how many."""
    values = {
        "queue_is_empty": queue_is_empty,
        "published_lease": PUBLISHED_LEASE,
        "lost_after": LOST_AFTER,
        "overtaken_by": OVERTAKEN_BY,
        "most": REQUEUE_BATCH,
    }
    count: int = fetch(SQL["requeue_lost"], values, prepare=False)[0][0]
    return count


def reset_impossible_due_times() -> int:
    """Makes due what waits longer than its state allows: a clock was wrong. Returns how many."""
    values = {
        "published_lease": PUBLISHED_LEASE,
        "sending_lease": sending_lease(),
        "first_retry": conf.RETRY_SECONDS,
        "longest_retry": LONGEST_RETRY_SECONDS,
    }
    return _count("reset_impossible_due_times", values)


# ---- Worker ----


def sending_lease() -> timedelta:
    return timedelta(seconds=conf.SENDING_LEASE_SECONDS)


def claim(ids: Iterable[int]) -> list[Claimed]:
    """Takes those of the deliveries that are queued. Of several copies of a message one gets it."""
    rows = fetch(SQL["claim"], {"ids": list(ids), "lease": sending_lease()})
    return [_claimed(*row) for row in sorted(rows)]


def _claimed(
    pk: int, number: int, recipient: str, email_id: UUID, seconds_left: float, *rest: Any
) -> Claimed:
    sender, subject, text, html, reply_to, headers, *others = rest
    addressed = (pk, number, recipient, email_id, seconds_left, sender, subject, text, html)
    return Claimed(*addressed, json.loads(reply_to), json.loads(headers), *others)


def record(ended: Sequence[Ended], begin: Sequence[Claimed] = ()) -> tuple[set[int], set[int]]:
    """Ends attempts, and notes of others that the server may get the message from now on.

    Returns the ids of those ended and of those begun. What is missing there is another's by now:
    the lease was lost.
    """
    values = {
        "ids": [each.id for each in ended],
        "numbers": [each.number for each in ended],
        "states": [each.step.state.value for each in ended],
        "failed_by": [str(each.step.failed_by) for each in ended],
        "waits": [each.step.wait for each in ended],
        "codes": [each.code for each in ended],
        "answers": [each.answer[:ANSWER_LENGTH] for each in ended],
        "seconds": [each.seconds for each in ended],
        "buckets": [_bucket(each.seconds) for each in ended],
        "suppress": [each.suppress for each in ended],
        "begin": [each.id for each in begin],
        "begin_numbers": [each.number for each in begin],
    }
    done: set[int] = set()
    begun: set[int] = set()
    for pk, began in fetch(SQL["record"], values):
        (begun if began else done).add(pk)
    return done, begun


def unclaim(claimed: Sequence[Claimed]) -> None:
    """Gives back claimed deliveries of which nothing was sent."""
    numbers = [each.number for each in claimed]
    _count("unclaim", {"ids": [each.id for each in claimed], "numbers": numbers})


def _bucket(seconds: float) -> float:
    return next((bucket for bucket in Counter.BUCKETS if seconds <= bucket), 0)


def requeue(ids: Sequence[int]) -> None:
    """Has the relay publish those again that still wait for a worker."""
    _count("requeue", {"ids": list(ids)})


# ---- A person ----


def replay(ids: Sequence[int]) -> int:
    """Queues failed and held deliveries again, with a new deadline; returns how many."""
    lifetime = timedelta(seconds=conf.DEADLINE_SECONDS)
    return _count("replay", {"ids": list(ids), "lifetime": lifetime})


def cancel(ids: Sequence[int]) -> int:
    """Cancels deliveries that no worker has begun to send; returns how many."""
    return _count("cancel", {"ids": list(ids)})


def _count(name: str, values: dict[str, Any]) -> int:
    with execute(SQL[name], values) as cursor:
        count: int = cursor.rowcount
        return count
