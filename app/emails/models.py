import hashlib
import hmac
import os
import random
import secrets
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count

from django.conf import settings
from django.db import connection, models, transaction
from django.db.models import Exists, F, OuterRef, Q
from django.utils import timezone

from emails import postgresql

# What a relay has taken it publishes within this, or gives it back.
PUBLISHING_LEASE = timedelta(seconds=30)
# A published message may wait behind others in the queue; after this the relay doubts it.
PUBLISHED_LEASE = timedelta(minutes=10)
LONGEST_RETRY = timedelta(hours=1)
# Due whatever the clock says, even one that is set back.
AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)


def uuid7() -> uuid.UUID:
    """A random UUID that begins with the time in milliseconds, so that keys sort by age."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 7 << 76 | secrets.randbits(12) << 64
    return uuid.UUID(int=value | 0b10 << 62 | secrets.randbits(62))


class State(models.TextChoices):
    QUEUED = "queued"  # waits for a worker
    SENDING = "sending"  # a worker holds it
    DEFERRED = "deferred"  # not taken by the server; waits for due_at
    UNCERTAIN = "uncertain"  # the server may have taken it; waits for due_at, or for a person
    SENT = "sent"
    FAILED = "failed"


UNFINISHED = (State.QUEUED, State.SENDING, State.DEFERRED, State.UNCERTAIN)
# What a person may send once more.
DEAD = Q(state=State.FAILED) | Q(state=State.UNCERTAIN, due_at=None)


class Email(models.Model):
    """What was accepted. Where it stands is told by its deliveries, one per recipient."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # None: the project's own code.
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.PROTECT,
        related_name="emails",
        null=True,
        blank=True,
    )
    sender = models.CharField(max_length=320)
    subject = models.CharField(max_length=255)
    text = models.TextField(blank=True)
    html = models.TextField(blank=True)
    reply_to = models.JSONField(default=list, db_default=[], blank=True)
    headers = models.JSONField(default=dict, db_default={}, blank=True)
    # Whether each recipient is shown who else is in "To" and "Cc", or only its own address.
    show_recipients = models.BooleanField(default=False, db_default=False)
    idempotency_key = models.CharField(max_length=255, null=True, blank=True)
    digest = models.CharField(max_length=64, default="", db_default="", blank=True)
    request_id = models.CharField(max_length=64, default="", db_default="", blank=True)
    created_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ("-created_at", "-id")
        constraints = [
            models.UniqueConstraint(
                fields=("owner", "idempotency_key"), name="one_email_a_key_and_owner"
            ),
            models.UniqueConstraint(
                fields=("idempotency_key",), condition=Q(owner=None), name="one_email_a_key"
            ),
        ]
        indexes = [models.Index(fields=("owner", "-created_at"), name="emails_of_an_owner")]

    def __str__(self) -> str:
        return str(self.id)

    @property
    def state(self) -> State:
        """The least finished state among the deliveries; of the finished ones, the worse."""
        states = {delivery.state for delivery in self.deliveries.all()}
        order = (
            State.SENDING,
            State.QUEUED,
            State.DEFERRED,
            State.UNCERTAIN,
            State.FAILED,
            State.SENT,
        )
        return next(state for state in order if state in states)


class Attachment(models.Model):
    email = models.ForeignKey(Email, on_delete=models.CASCADE, related_name="attachments")
    filename = models.CharField(max_length=255, blank=True)
    content_type = models.CharField(max_length=127)
    content_id = models.CharField(max_length=255, blank=True)  # what an HTML body calls it by
    content = models.BinaryField()

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.email_id}/{self.filename}"


class DeliveryQuerySet(models.QuerySet):
    """Every change of state is one conditional UPDATE, so of several contenders one wins.

    Relay: lease -> (publish) -> published, or release if that failed. Worker: claim -> (SMTP,
    mark_data once the server wants the message) -> record.
    """

    def due(self):
        """What the relay must look at: its time has come, or its lease ended."""
        return self.filter(due_at__lte=timezone.now(), state__in=UNFINISHED).order_by(
            "due_at", "pk"
        )

    def mistrust_clock(self) -> int:
        """Makes due what waits for a time later than any that is set in its state.

        The clock was wrong when it was set, or has been set back since.
        """
        now = timezone.now()
        too_far = Q(state=State.QUEUED, due_at__gt=now + PUBLISHED_LEASE * 1.1)
        too_far |= Q(state=State.SENDING, due_at__gt=now + sending_lease() * 1.1)
        for attempts in count(1):
            longest = longest_retry(attempts)
            last = longest == LONGEST_RETRY
            too_far |= Q(
                state__in=(State.DEFERRED, State.UNCERTAIN),
                due_at__gt=now + longest * 1.1,
                **{"attempts__gte" if last else "attempts": attempts},
            )
            if last:
                break
        return self.filter(too_far).update(due_at=AT_ONCE)

    def lease(self, most: int) -> list["Delivery"]:
        """Takes up to `most` due deliveries for publishing, the oldest first.

        Several relays take different ones: PostgreSQL skips what another one is about to take,
        SQLite lets one transaction write at a time. What has passed its deadline is ended, and
        what its worker left behind is settled, on the way.
        """
        due = self.due()
        if not due.exists():
            return []
        now = timezone.now()
        with transaction.atomic():
            if connection.features.has_select_for_update_skip_locked:
                due = due.select_for_update(skip_locked=True, of=("self",))
            taken, abandoned = [], []
            for delivery in due.select_related("email").only(*LEASED_FIELDS)[:most]:
                kept = abandoned if delivery.state == State.SENDING else taken
                kept.append(delivery)
            for delivery in abandoned:
                delivery.settle_abandoned(now)
            for delivery in taken:
                if delivery.deadline <= now:
                    delivery.end_late()
            taken = [delivery for delivery in taken if delivery.deadline > now]
            until = now + PUBLISHING_LEASE
            self.filter(pk__in=[delivery.pk for delivery in taken]).update(
                state=State.QUEUED, due_at=until
            )
            for delivery in taken:
                delivery.state, delivery.due_at = State.QUEUED, until
        return taken

    def release(self, deliveries: Sequence["Delivery"]) -> None:
        """Gives leases back, unless a worker has the delivery by now."""
        self._end_lease(deliveries, AT_ONCE)

    def published(self, deliveries: Sequence["Delivery"]) -> None:
        """Leaves to the workers what the broker has, unless one has the delivery by now."""
        self._end_lease(deliveries, timezone.now() + PUBLISHED_LEASE)

    def _end_lease(self, deliveries: Sequence["Delivery"], due_at: datetime) -> None:
        """Of deliveries that were leased together."""
        if deliveries:
            self.filter(
                pk__in=[delivery.pk for delivery in deliveries],
                state=State.QUEUED,
                due_at=deliveries[0].due_at,
            ).update(due_at=due_at)

    def claim(self, pk: int) -> "Delivery | None":
        """Takes a queued delivery for sending. Only one of several copies of a message gets it."""
        now = timezone.now()
        until = now + sending_lease()
        if connection.vendor == "postgresql":
            return postgresql.claim(pk, now, until)
        claimed = self.filter(pk=pk, state=State.QUEUED).update(
            state=State.SENDING,
            attempts=F("attempts") + 1,
            data_sent=False,
            started_at=now,
            due_at=until,
        )
        if not claimed:
            return None
        attached = Attachment.objects.filter(email=OuterRef("email"))
        return self.select_related("email").annotate(has_attachments=Exists(attached)).get(pk=pk)

    def give_back(self, pks: Sequence[int]) -> None:
        """Has the relay publish them anew, those that still wait."""
        self.filter(pk__in=pks, state=State.QUEUED).update(due_at=AT_ONCE)

    def replay(self) -> int:
        """Sends the dead ones among these once more, with a new deadline; returns how many."""
        return self.filter(DEAD).update(
            state=State.QUEUED,
            due_at=AT_ONCE,
            expires_at=timezone.now() + timedelta(seconds=settings.DEADLINE_SECONDS),
        )


# An email's bodies are none of the relay's business.
LEASED_FIELDS = (
    "email__created_at",
    "email__request_id",
    "state",
    "attempts",
    "data_sent",
    "due_at",
    "started_at",
    "expires_at",
)


def sending_lease() -> timedelta:
    return timedelta(seconds=settings.SENDING_LEASE_SECONDS)


class Delivery(models.Model):
    """One recipient of one email."""

    class Kind(models.TextChoices):
        TO = "to"
        CC = "cc"
        BCC = "bcc"

    email = models.ForeignKey(Email, on_delete=models.CASCADE, related_name="deliveries")
    recipient = models.CharField(max_length=320)
    kind = models.CharField(max_length=3, choices=Kind, default=Kind.TO, db_default=Kind.TO)
    state = models.CharField(max_length=9, choices=State, default=State.QUEUED)
    attempts = models.PositiveIntegerField(default=0)
    uncertain_attempts = models.PositiveIntegerField(default=0, db_default=0)
    # When the relay looks at it: the next attempt, or the end of a lease. None: never.
    due_at = models.DateTimeField(
        default=AT_ONCE, null=True, blank=True, db_column="next_attempt_at"
    )
    # After it no attempt begins. None: DEADLINE_SECONDS after the email was accepted.
    expires_at = models.DateTimeField(null=True, blank=True)
    # Of the present attempt: when it began, and whether the server got any of the message.
    started_at = models.DateTimeField(null=True, blank=True)
    data_sent = models.BooleanField(default=False, db_default=False)
    # Of the release before this one, whose processes write it while they are being replaced.
    lease_until = models.DateTimeField(null=True, blank=True, editable=False)
    sent_at = models.DateTimeField(null=True, blank=True)
    last_smtp_code = models.PositiveSmallIntegerField(null=True, blank=True)
    last_error = models.CharField(max_length=500, blank=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        ordering = ("id",)
        verbose_name_plural = "deliveries"
        permissions = [("replay_delivery", "Can send dead deliveries once more")]
        constraints = [
            models.UniqueConstraint(fields=("email", "recipient"), name="one_delivery_a_recipient")
        ]
        indexes = [
            models.Index(
                fields=("due_at", "id"),
                condition=Q(state__in=UNFINISHED),
                name="due_deliveries",
            ),
            models.Index(
                fields=("-id",),
                condition=Q(state__in=(State.FAILED, State.UNCERTAIN)),
                name="dead_deliveries",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.email_id}/{self.pk}"

    @property
    def message_id(self) -> str:
        """The Message-ID header: the same at each attempt, so a duplicate is recognisable."""
        domain = self.email.sender.rpartition("@")[2].rstrip(">")
        return f"<{self.email_id}.{self.pk}@{domain}>"

    @property
    def deadline(self) -> datetime:
        lifetime = timedelta(seconds=settings.DEADLINE_SECONDS)
        return self.expires_at or self.email.created_at + lifetime

    @property
    def next_attempt_at(self) -> datetime | None:
        return self.due_at if self.state in (State.DEFERRED, State.UNCERTAIN) else None

    @property
    def dead(self) -> bool:
        return self.state == State.FAILED or (self.state == State.UNCERTAIN and self.due_at is None)

    def mark_data(self) -> bool:
        """Notes that the message itself is about to go; false if the lease was lost.

        Then somebody else has the delivery, and sending would be a duplicate without a trace.
        """
        if connection.vendor == "postgresql":
            return postgresql.mark_data(self.pk, self.attempts)
        ours = Delivery.objects.filter(pk=self.pk, state=State.SENDING, attempts=self.attempts)
        return ours.update(data_sent=True) == 1

    def record(self, state: State, *, code: int | None, answer: str, seconds: float, due_at=None):
        """Ends this attempt; false if the lease was lost meanwhile and the outcome isn't ours.

        That an email was sent is recorded all the same: it can't be taken back.
        """
        sent = state == State.SENT
        error = "" if sent else answer[:500]
        sent_at = timezone.now() if sent else None
        uncertain = int(state == State.UNCERTAIN)
        started_at = self.started_at or timezone.now()
        tally = f"attempts.{state}"
        if connection.vendor == "postgresql":
            bucket, slot = Tally.place(seconds)
            return postgresql.record(
                delivery=self.pk,
                whoever=sent,
                state=state.value,
                due_at=due_at,
                code=code,
                error=error,
                sent_at=sent_at,
                uncertain=uncertain,
                number=self.attempts,
                started_at=started_at,
                seconds=seconds,
                answer=answer[:500],
                tally=tally,
                bucket=bucket,
                slot=slot,
            )
        rows = Delivery.objects.filter(pk=self.pk)
        if not sent:
            rows = rows.filter(state=State.SENDING, attempts=self.attempts)
        with transaction.atomic():
            recorded = rows.update(
                state=state,
                due_at=due_at,
                last_smtp_code=code,
                last_error=error,
                sent_at=sent_at or F("sent_at"),
                uncertain_attempts=F("uncertain_attempts") + uncertain,
            )
            if recorded:
                Attempt.objects.create(
                    delivery=self,
                    number=self.attempts,
                    started_at=started_at,
                    seconds=seconds,
                    outcome=state,
                    smtp_code=code,
                    answer=answer[:500],
                )
                Tally.add(tally, seconds)
        return bool(recorded)

    def settle_abandoned(self, now: datetime) -> None:
        """Ends an attempt whose worker is gone."""
        if self.data_sent:
            state, due_at = State.UNCERTAIN, after_uncertain(self.attempts)
            answer = "The worker was lost after it had begun to send the message."
        else:
            state, due_at = State.DEFERRED, AT_ONCE
            answer = "The worker was lost before it sent the message."
        seconds = max((now - self.started_at).total_seconds(), 0) if self.started_at else 0
        self.record(state, code=None, answer=answer, seconds=seconds, due_at=due_at)

    def end_late(self) -> None:
        """Gives up what was not sent before its deadline; the reason of its last attempt stays."""
        values = {"due_at": None}
        if self.state != State.UNCERTAIN:
            values["state"] = State.FAILED
        if not self.attempts:
            values["last_error"] = "The deadline passed before an attempt."
        if Delivery.objects.filter(pk=self.pk, state=self.state, attempts=self.attempts).update(
            **values
        ):
            Tally.add("expired")


def longest_retry(attempts: int) -> timedelta:
    first = timedelta(seconds=settings.RETRY_SECONDS)
    return min(first * 2 ** min(attempts - 1, 16), LONGEST_RETRY)


def retry_delay(attempts: int) -> timedelta:
    """How long to wait after so many attempts: in the second half of a doubling range, capped.

    Not in the first: short waits while a server is down would soon be followed by very long ones.
    """
    share = 0.5 + random.random() / 2  # noqa: S311 - spreads load, hides nothing
    return longest_retry(attempts) * share


def after_uncertain(attempts: int) -> datetime | None:
    if settings.UNCERTAIN_POLICY == "hold":
        return None
    return timezone.now() + retry_delay(attempts)


class Attempt(models.Model):
    """What came of one try to send. `answer` is the server's, or what went wrong."""

    delivery = models.ForeignKey(Delivery, on_delete=models.CASCADE, related_name="log")
    number = models.PositiveIntegerField()
    started_at = models.DateTimeField()
    seconds = models.FloatField()
    outcome = models.CharField(max_length=9, choices=State)
    smtp_code = models.PositiveSmallIntegerField(null=True, blank=True)
    answer = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.delivery_id}.{self.number}"


class Tally(models.Model):
    """Running totals for the metrics; rows that are deleted after their time are still in them.

    Each process adds to a row of its own, so that nobody waits for another's transaction.
    """

    SLOTS = 64
    BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

    name = models.CharField(max_length=40)
    bucket = models.FloatField(default=0)
    slot = models.PositiveSmallIntegerField()
    total = models.BigIntegerField(default=0)
    seconds = models.FloatField(default=0)

    class Meta:
        verbose_name_plural = "tallies"
        constraints = [
            models.UniqueConstraint(fields=("name", "bucket", "slot"), name="one_tally_a_slot")
        ]

    def __str__(self) -> str:
        return self.name

    @classmethod
    def place(cls, seconds: float | None) -> tuple[float, int]:
        """The smallest bucket that holds `seconds`, 0 if none does, and this thread's slot."""
        fits = (bucket for bucket in cls.BUCKETS if seconds is not None and seconds <= bucket)
        return next(fits, 0), hash((os.getpid(), threading.get_ident())) % cls.SLOTS

    @classmethod
    def add(cls, name: str, seconds: float | None = None, by: int = 1) -> None:
        """Adds to a total; a transaction's last statement, as it holds a row that is shared."""
        bucket, slot = cls.place(seconds)
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO emails_tally (name, bucket, slot, total, seconds)"
                " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (name, bucket, slot) DO UPDATE SET"
                " total = emails_tally.total + excluded.total,"
                " seconds = emails_tally.seconds + excluded.seconds",
                (name, bucket, slot, by, seconds or 0),
            )


class Allowance(models.Model):
    """What a user may send, where it differs from the settings."""

    owner = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="allowance"
    )
    senders = models.TextField(
        blank=True,
        help_text="Addresses and @domains, separated by spaces. Empty: those of the settings.",
    )
    recipients_per_hour = models.PositiveIntegerField(
        null=True, blank=True, help_text="Empty: as the settings say. 0: nothing."
    )

    def __str__(self) -> str:
        return str(self.owner)


class ApiKey(models.Model):
    """Lets a program act for a user. Only the hash of the key is kept.

    The hash is a plain one: keys are random and long, so there is nothing to guess.
    """

    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys"
    )
    name = models.CharField(max_length=100)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    revoked = models.BooleanField(default=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("owner", "name"), name="one_key_a_name_and_owner")
        ]

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def hash(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    @classmethod
    def authenticate(cls, key: str) -> "ApiKey | None":
        digest = cls.hash(key)
        if connection.vendor == "postgresql":
            found = postgresql.find_key(digest)
        else:
            keys = cls.objects.select_related("owner__allowance")
            found = keys.filter(digest=digest).first()
        if found and hmac.compare_digest(found.digest, digest):
            return found if found.owner.is_active and not found.revoked else None
        return None
