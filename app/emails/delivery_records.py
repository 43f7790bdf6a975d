"""What the functions of emails/deliveries.py take and give."""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from emails.outcomes import Step


@dataclass(frozen=True)
class Leased:
    """What the relay needs for publishing a delivery."""

    id: int
    email_id: UUID
    request_id: str


@dataclass
class Lease:
    """Deliveries that one call took. `reached` is the due time up to which none was left."""

    published_at: datetime | None = None
    deliveries: list[Leased] = field(default_factory=list)
    found: int = 0
    reached: datetime | None = None


@dataclass
class Claimed:
    """A delivery that a worker sends, with its email."""

    id: int
    number: int  # of the attempt, from 1
    recipient: str
    email_id: UUID
    seconds_left: float  # until the deadline, when it was claimed
    sender: str
    subject: str
    text: str
    html: str
    reply_to: list[str]
    headers: dict[str, str]
    show_recipients: bool
    created_at: datetime
    request_id: str
    has_attachments: bool

    @property
    def message_id(self) -> str:
        """The Message-ID header: the same at each attempt, so a duplicate is recognisable."""
        domain = self.sender.rpartition("@")[2].rstrip(">")
        return f"<{self.email_id}.{self.id}@{domain}>"


@dataclass(frozen=True)
class Ended:
    """An attempt that ended. `code` is the SMTP reply's; None if there was no reply."""

    id: int
    number: int
    step: Step
    code: int | None
    answer: str
    seconds: float
    suppress: bool = False  # the server says that there is no such recipient
