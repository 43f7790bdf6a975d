"""The hourly limit of recipients of an owner."""

from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.utils import timezone

from emails.conf import conf
from emails.models import Delivery, Email, SendingLimits


class OverLimit(Exception):
    """The email exceeds the owner's hourly limit."""


def limit_of(owner: Any) -> int | None:
    """The owner's limit, or None."""
    if owner is None:
        return None
    limits: SendingLimits | None = getattr(owner, "sending_limits", None)
    if limits and limits.recipients_per_hour is not None:
        return limits.recipients_per_hour
    return conf.RECIPIENTS_PER_HOUR or None


def lock(owner: Any) -> None:
    """Locks the owner, so that batches are stored one by one; with a limit, single emails too."""
    get_user_model().objects.select_for_update(no_key=True).only("pk").get(pk=owner.pk)


class Remaining:
    """The remaining part of an owner's limit, in a transaction that holds the owner's lock."""

    def __init__(self, owner: Any, limit: int) -> None:
        hour = timezone.now() - timedelta(hours=1)
        sent = Delivery.objects.filter(email__owner=owner, email__created_at__gt=hour).count()
        self.recipients = limit - sent

    def check(self, email: Email, count: int) -> None:
        """Raises OverLimit, unless the key exists: a repeated request adds no recipients."""
        if count <= self.recipients:
            return
        key = email.idempotency_key
        if not key or not Email.objects.filter(owner=email.owner, idempotency_key=key).exists():
            raise OverLimit
