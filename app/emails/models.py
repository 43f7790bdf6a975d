"""The tables. Only emails/deliveries.py changes the state of deliveries."""

from datetime import datetime

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from emails.ids import uuid7
from emails.states import CANCELLABLE, UNFINISHED, FailedBy, State

# Deliveries that only an operator can retry.
NEEDS_OPERATOR = Q(state=State.FAILED) | Q(state=State.UNCERTAIN, due_at=None)

# The state of an email is the first of these states that one of its deliveries has.
STATE_ORDER = (
    State.SENDING,
    State.QUEUED,
    State.DEFERRED,
    State.SCHEDULED,
    State.UNCERTAIN,
    State.FAILED,
    State.SENT,
    State.CANCELLED,
    State.SKIPPED,
)


class Email(models.Model):
    """An accepted email. It has one delivery per recipient. Only deliveries have a state."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # None: an email of the project's own code.
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
    reply_to = models.JSONField(default=list, blank=True)
    headers = models.JSONField(default=dict, blank=True)
    # True: "To" and "Cc" name all recipients. False: "To" names only the recipient of the message.
    show_recipients = models.BooleanField(default=False)
    idempotency_key = models.CharField(max_length=255, null=True, blank=True)
    digest = models.CharField(max_length=64, default="", blank=True)
    request_id = models.CharField(max_length=64, default="", blank=True)
    created_at = models.DateTimeField(db_default=Now(), db_index=True, editable=False)

    class Meta:
        ordering = ("-created_at", "-id")
        constraints = [
            models.UniqueConstraint(
                fields=("owner", "idempotency_key"), name="emails_email_owner_key"
            ),
            models.UniqueConstraint(
                fields=("idempotency_key",), condition=Q(owner=None), name="emails_email_key"
            ),
        ]
        indexes = [models.Index(fields=("owner", "-id"), name="emails_email_by_owner")]

    def __str__(self) -> str:
        return str(self.id)

    @property
    def state(self) -> State:
        states = {delivery.state for delivery in self.deliveries.all()}
        return next(state for state in STATE_ORDER if state in states)

    @property
    def can_cancel(self) -> bool:
        return any(delivery.state in CANCELLABLE for delivery in self.deliveries.all())

    @property
    def needs_operator(self) -> bool:
        return any(delivery.needs_operator for delivery in self.deliveries.all())


class Attachment(models.Model):
    email = models.ForeignKey(Email, on_delete=models.CASCADE, related_name="attachments")
    filename = models.CharField(max_length=255, blank=True)
    content_type = models.CharField(max_length=127)
    content_id = models.CharField(max_length=255, blank=True)  # referenced by the HTML body
    content = models.BinaryField()

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.email_id}/{self.filename}"


class Delivery(models.Model):
    """One recipient of one email."""

    class Kind(models.TextChoices):
        TO = "to"
        CC = "cc"
        BCC = "bcc"

    email = models.ForeignKey(Email, on_delete=models.CASCADE, related_name="deliveries")
    recipient = models.CharField(max_length=320)
    domain = models.CharField(max_length=255, editable=False)  # the recipient's, in lower case
    kind = models.CharField(max_length=3, choices=Kind, default=Kind.TO)
    state = models.CharField(max_length=9, choices=State, default=State.QUEUED)
    failed_by = models.CharField(max_length=8, choices=FailedBy, default="", blank=True)
    attempts = models.PositiveIntegerField(default=0)
    uncertain_attempts = models.PositiveIntegerField(default=0)
    # When the relay next processes the delivery: for an attempt, or when a lease ends. None: never.
    due_at = models.DateTimeField(null=True, blank=True)
    # When the relay last leased the delivery. None: the relay has not leased it since it became
    # due.
    published_at = models.DateTimeField(null=True, blank=True, editable=False)
    # No attempt starts after this time.
    expires_at = models.DateTimeField()
    # The last attempt: its start, and whether the server may have received the message.
    started_at = models.DateTimeField(null=True, blank=True)
    data_sent = models.BooleanField(default=False)
    sent_at = models.DateTimeField(null=True, blank=True)
    last_smtp_code = models.PositiveSmallIntegerField(null=True, blank=True)
    last_error = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ("id",)
        verbose_name_plural = "deliveries"
        permissions = [("replay_delivery", "Can retry failed and held deliveries")]
        constraints = [
            models.UniqueConstraint(fields=("email", "recipient"), name="emails_delivery_recipient")
        ]
        indexes = [
            models.Index(
                fields=("due_at", "id"),
                condition=Q(state__in=UNFINISHED),
                name="emails_delivery_due",
            ),
            models.Index(
                fields=("state", "-id"),
                condition=Q(
                    state__in=(State.FAILED, State.UNCERTAIN, State.CANCELLED, State.SKIPPED)
                ),
                name="emails_delivery_rare",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.email_id}/{self.pk}"

    @property
    def next_attempt_at(self) -> datetime | None:
        waits = self.state in (State.SCHEDULED, State.DEFERRED, State.UNCERTAIN)
        return self.due_at if waits else None

    @property
    def needs_operator(self) -> bool:
        held = self.state == State.UNCERTAIN and self.due_at is None
        return held or self.state == State.FAILED


class Attempt(models.Model):
    """The result of an attempt to send. `answer` is the server's reply or the error."""

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


class Counter(models.Model):
    """Counters for the metrics. They survive the deletion of old emails.

    Each event adds a row, so no transaction waits for another. The relay merges the rows.
    """

    # Upper bounds of the histogram in seconds. 0 is the bucket for longer times.
    BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

    name = models.CharField(max_length=40)
    bucket = models.FloatField(default=0)
    total = models.BigIntegerField(default=0)
    seconds = models.FloatField(default=0)

    def __str__(self) -> str:
        return self.name


class DomainPace(models.Model):
    """The unused part of a domain's rate, if EMAILS_DOMAIN_LIMITS sets a rate."""

    domain = models.CharField(max_length=255, primary_key=True)
    tokens = models.FloatField()
    updated_at = models.DateTimeField()

    def __str__(self) -> str:
        return self.domain


class Suppression(models.Model):
    """An address to which an owner's emails are not sent."""

    class Reason(models.TextChoices):
        MANUAL = "manual"
        REFUSED = "refused", "refused by its mail server"

    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        related_name="suppressions",
        null=True,
        blank=True,
    )
    address = models.CharField(max_length=320, help_text="In lower case.")
    reason = models.CharField(max_length=7, choices=Reason, default=Reason.MANUAL)
    detail = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("address",)
        constraints = [
            models.UniqueConstraint(fields=("address", "owner"), name="emails_suppression_owner"),
            models.UniqueConstraint(
                fields=("address",), condition=Q(owner=None), name="emails_suppression_project"
            ),
        ]

    def __str__(self) -> str:
        return self.address


class SendingLimits(models.Model):
    """A user's limits that override the settings."""

    owner = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="sending_limits"
    )
    senders = models.TextField(
        blank=True,
        help_text="Addresses and @domains, separated by spaces. Empty: the settings apply.",
    )
    recipients_per_hour = models.PositiveIntegerField(
        null=True, blank=True, help_text="Empty: the settings apply. 0: no limit."
    )

    class Meta:
        verbose_name_plural = "sending limits"

    def __str__(self) -> str:
        return str(self.owner)


class ApiKey(models.Model):
    """Lets a program act for a user. Only the SHA-256 of the key is stored.

    A hash without a salt is enough: keys are random and long, so they can't be guessed.
    """

    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys"
    )
    name = models.CharField(max_length=100)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    revoked = models.BooleanField(default=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("owner", "name"), name="emails_apikey_owner_name")
        ]

    def __str__(self) -> str:
        return self.name
