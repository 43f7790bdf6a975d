from django.db.models import TextChoices


class State(TextChoices):
    SCHEDULED = "scheduled"  # waits for its send_at
    QUEUED = "queued"  # waits for a worker
    SENDING = "sending"  # a worker is sending it
    DEFERRED = "deferred"  # not accepted by the server yet; retried at due_at
    UNCERTAIN = "uncertain"  # the server may have accepted it; retried at due_at, or held
    SENT = "sent"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"  # the recipient is on the owner's suppression list


# States that are not final.
UNFINISHED = (State.SCHEDULED, State.QUEUED, State.SENDING, State.DEFERRED, State.UNCERTAIN)
CANCELLABLE = (State.SCHEDULED, State.QUEUED, State.DEFERRED)


class FailedBy(TextChoices):
    """Why a delivery failed."""

    SERVER = "server"
    DEADLINE = "deadline"
