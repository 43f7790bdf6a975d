"""The state machine of deliveries: a function for each statement of emails/sql/deliveries.sql.

The relay leases a delivery and publishes it, or releases it if publishing fails. A worker claims
it, begins it just before the message goes to the mail server, and records the outcome.
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

# How long a published message may wait in the queue before the delivery is published again.
PUBLISHED_LEASE = timedelta(minutes=10)
# A publication counts as lost if the queue is empty and no worker received it within this time,
LOST_AFTER = timedelta(seconds=30)
# or if a worker received another publication that was sent at least this much later.
OVERTAKEN_BY = timedelta(seconds=60)
REQUEUE_BATCH = 1000
BEGINNING_OF_TIME = datetime(1970, 1, 1, tzinfo=UTC)
ANSWER_LENGTH = 500


def following(result: State, *, attempts: int, seconds_left: float) -> Step:
    """The next step after an attempt, with the policy and the waits from the settings."""
    return next_step(
        result,
        attempts=attempts,
        seconds_left=seconds_left,
        policy=conf.UNCERTAIN_POLICY,
        retry_seconds=conf.RETRY_SECONDS,
        jitter=random.random(),  # noqa: S311 - spreads load, no cryptography
    )


# ---- Relay ----


def is_due(floor: datetime = BEGINNING_OF_TIME) -> bool:
    """Whether a delivery became due at or after `floor`."""
    found: bool = fetch(SQL["due_exists"], {"floor": floor}, prepare=False)[0][0]
    return found


def lease(most: int, floor: datetime = BEGINNING_OF_TIME) -> Lease:
    """Leases up to `most` deliveries that became due at or after `floor`, for publishing.

    Also expires deliveries whose deadline has passed, and ends attempts whose worker has died.
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
        # The statement is not prepared. A plan for an empty table would scan a full table
        # completely.
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
        result, answer = State.UNCERTAIN, "The worker died while it was sending the message."
    else:
        result, answer = State.DEFERRED, "The worker died before it sent the message."
    step = following(result, attempts=number, seconds_left=max(left, 0))
    if step.state == State.DEFERRED:
        step = Step(State.DEFERRED, 0)  # retry now, because the mail server did not fail
    return Ended(pk, number, step, None, answer, max(seconds, 0))


def release(lease: Lease) -> None:
    """Ends the leases of unpublished deliveries, unless another process has leased them again."""
    if lease.deliveries:
        ids = [delivery.id for delivery in lease.deliveries]
        _count("release", {"ids": ids, "published_at": lease.published_at})


def is_waiting_for_worker() -> bool:
    """Whether a delivery has been waiting for a worker so long that its message may be lost."""
    values = {"published_lease": PUBLISHED_LEASE, "lost_after": LOST_AFTER}
    found: bool = fetch(SQL["published_exists"], values, prepare=False)[0][0]
    return found


def requeue_lost(queue_is_empty: bool) -> int:
    """Makes deliveries due if RabbitMQ confirmed their message and lost it; returns their
    number."""
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
    """Makes deliveries due now if a wrong clock made their due time later than their state allows.

    Returns the number of these deliveries.
    """
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
    """Claims these deliveries if they are queued, so that duplicate messages send nothing twice."""
    rows = fetch(SQL["claim"], {"ids": list(ids), "lease": sending_lease()})
    return [_claimed(*row) for row in sorted(rows)]


def _claimed(
    pk: int, number: int, recipient: str, email_id: UUID, seconds_left: float, *rest: Any
) -> Claimed:
    sender, subject, text, html, reply_to, headers, *others = rest
    addressed = (pk, number, recipient, email_id, seconds_left, sender, subject, text, html)
    return Claimed(*addressed, json.loads(reply_to), json.loads(headers), *others)


def record(ended: Sequence[Ended], begin: Sequence[Claimed] = ()) -> tuple[set[int], set[int]]:
    """Ends attempts, and begins others: marks the deliveries that a worker is about to send.

    Returns the ids of the ended and of the begun attempts. If an id is missing, its lease was lost.
    """
    values = {
        "ids": [each.id for each in ended],
        "numbers": [each.number for each in ended],
        "states": [each.step.state.value for each in ended],
        "failed_by": [str(each.step.failed_by) for each in ended],
        "waits": [_float(each.step.wait) for each in ended],
        "codes": [each.code for each in ended],
        "answers": [each.answer[:ANSWER_LENGTH] for each in ended],
        "seconds": [_float(each.seconds) for each in ended],
        "buckets": [_float(_bucket(each.seconds)) for each in ended],
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
    """Returns claimed deliveries to the queue, because they were not sent."""
    numbers = [each.number for each in claimed]
    _count("unclaim", {"ids": [each.id for each in claimed], "numbers": numbers})


def _float(seconds: float | None) -> float | None:
    """The value as a float: psycopg refuses a list that contains floats and integers."""
    return None if seconds is None else float(seconds)


def _bucket(seconds: float) -> float:
    return next((bucket for bucket in Counter.BUCKETS if seconds <= bucket), 0)


def requeue(ids: Sequence[int]) -> None:
    """Makes deliveries due again if they still wait for a worker, so the relay publishes them."""
    _count("requeue", {"ids": list(ids)})


# ---- Operator ----


def replay(ids: Sequence[int]) -> int:
    """Queues failed and held deliveries again, with a new deadline; returns their number."""
    lifetime = timedelta(seconds=conf.DEADLINE_SECONDS)
    return _count("replay", {"ids": list(ids), "lifetime": lifetime})


def cancel(ids: Sequence[int]) -> int:
    """Cancels deliveries that no worker has started to send; returns their number."""
    return _count("cancel", {"ids": list(ids)})


def _count(name: str, values: dict[str, Any]) -> int:
    with execute(SQL[name], values) as cursor:
        count: int = cursor.rowcount
        return count
