"""How many recipients an owner may have within an hour."""

from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.utils import timezone

from emails.conf import conf
from emails.models import Delivery, Email, SendingLimits


class OverLimit(Exception):
    """The owner has sent to as many recipients as it may within an hour."""


def limit_of(owner: Any) -> int | None:
    """The owner's limit; None: it has none."""
    if owner is None:
        return None
    limits: SendingLimits | None = getattr(owner, "sending_limits", None)
    if limits and limits.recipients_per_hour is not None:
        return limits.recipients_per_hour
    return conf.RECIPIENTS_PER_HOUR or None


def lock(owner: Any) -> None:
    """Has the owner's other batches, and its other emails if it has a limit, wait for this one."""
    get_user_model().objects.select_for_update(no_key=True).only("pk").get(pk=owner.pk)


class Remaining:
    """What the limit leaves to an owner, in a transaction that has the owner's lock."""

    def __init__(self, owner: Any, limit: int) -> None:
        hour = timezone.now() - timedelta(hours=1)
        sent = Delivery.objects.filter(email__owner=owner, email__created_at__gt=hour).count()
        self.recipients = limit - sent

    def check(self, email: Email, count: int) -> None:
        """Raises OverLimit, unless the email has a key that is in use: then it isn't new."""
        if count <= self.recipients:
            return
        key = email.idempotency_key
        if not key or not Email.objects.filter(owner=email.owner, idempotency_key=key).exists():
            raise OverLimit
