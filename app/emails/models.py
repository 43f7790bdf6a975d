import hashlib
import hmac
import secrets
import time
import uuid
from datetime import timedelta

from django.conf import settings
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

# A published message may wait behind others in the queue; after this the relay doubts it.
PUBLISHED_LEASE = timedelta(minutes=10)


def uuid7() -> uuid.UUID:
    """A random UUID that begins with the time in milliseconds, so that keys sort by age."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 7 << 76 | secrets.randbits(12) << 64
    return uuid.UUID(int=value | 0b10 << 62 | secrets.randbits(62))


class State(models.TextChoices):
    QUEUED = "queued"  # waits for a worker
    SENDING = "sending"  # a worker holds it
    DEFERRED = "deferred"  # refused for now, waits for next_attempt_at
    SENT = "sent"
    FAILED = "failed"


UNFINISHED = (State.QUEUED, State.SENDING, State.DEFERRED)


class Email(models.Model):
    """What was accepted. Where it stands is told by its deliveries, one per recipient."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="emails"
    )
    sender = models.CharField(max_length=320)
    subject = models.CharField(max_length=255)
    text = models.TextField()
    html = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ("-created_at", "-id")

    def __str__(self) -> str:
        return str(self.id)

    @property
    def state(self) -> State:
        """The least finished state among the deliveries; of the finished ones, the worse."""
        states = {delivery.state for delivery in self.deliveries.all()}
        order = (State.SENDING, State.QUEUED, State.DEFERRED, State.FAILED, State.SENT)
        return next(state for state in order if state in states)


class DeliveryQuerySet(models.QuerySet):
    """Every change of state is one conditional UPDATE, so of several contenders one wins.

    Relay: due -> lease -> (publish) -> release if that failed. Worker: claim -> (SMTP) -> record.
    """

    def due(self):
        """What the relay must publish: its time has come and nobody holds an unexpired lease."""
        now = timezone.now()
        return self.filter(
            Q(lease_until=None) | Q(lease_until__lte=now),
            state__in=UNFINISHED,
            next_attempt_at__lte=now,
        ).order_by("next_attempt_at")

    def lease(self, pk: int):
        """Takes a due delivery for publishing; returns when the lease ends, or None if it's taken.

        A delivery whose worker died is queued again by this.
        """
        until = timezone.now() + PUBLISHED_LEASE
        taken = self.due().filter(pk=pk).update(state=State.QUEUED, lease_until=until)
        return until if taken else None

    def release(self, pk: int, until) -> None:
        """Gives back the lease that ends at `until`, unless a worker has the delivery by now."""
        self.filter(pk=pk, state=State.QUEUED, lease_until=until).update(lease_until=None)

    def claim(self, pk: int) -> "Delivery | None":
        """Takes a queued delivery for sending. Only one of several copies of a message gets it."""
        until = timezone.now() + timedelta(seconds=settings.SENDING_LEASE_SECONDS)
        claimed = self.filter(pk=pk, state=State.QUEUED).update(
            state=State.SENDING, attempts=F("attempts") + 1, lease_until=until
        )
        return self.select_related("email").get(pk=pk) if claimed else None


class Delivery(models.Model):
    """One recipient of one email."""

    email = models.ForeignKey(Email, on_delete=models.CASCADE, related_name="deliveries")
    recipient = models.CharField(max_length=320)
    state = models.CharField(max_length=8, choices=State, default=State.QUEUED)
    attempts = models.PositiveIntegerField(default=0)
    next_attempt_at = models.DateTimeField(default=timezone.now)
    lease_until = models.DateTimeField(null=True, blank=True)
    sent_at = models.DateTimeField(null=True, blank=True)
    last_smtp_code = models.PositiveSmallIntegerField(null=True, blank=True)
    last_error = models.CharField(max_length=500, blank=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        ordering = ("id",)
        verbose_name_plural = "deliveries"
        constraints = [
            models.UniqueConstraint(fields=("email", "recipient"), name="one_delivery_a_recipient")
        ]
        indexes = [
            models.Index(
                fields=("next_attempt_at",),
                condition=Q(state__in=UNFINISHED),
                name="unfinished_deliveries",
            )
        ]

    def __str__(self) -> str:
        return f"{self.email_id}/{self.pk}"

    @property
    def message_id(self) -> str:
        """The Message-ID header: the same at each attempt, so a duplicate is recognisable."""
        domain = self.email.sender.rpartition("@")[2].rstrip(">")
        return f"<{self.email_id}.{self.pk}@{domain}>"

    def record(self, state: State, **values) -> bool:
        """Ends this attempt; false if the lease was lost meanwhile and the outcome isn't ours.

        That an email was sent is recorded all the same: it can't be taken back.
        """
        rows = Delivery.objects.filter(pk=self.pk)
        if state != State.SENT:
            rows = rows.filter(state=State.SENDING, attempts=self.attempts)
        return bool(rows.update(state=state, lease_until=None, **values))


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
        found = cls.objects.select_related("owner").filter(digest=digest).first()
        if found and hmac.compare_digest(found.digest, digest):
            return found if found.owner.is_active and not found.revoked else None
        return None
