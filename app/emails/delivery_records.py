"""Parameters and results of the functions in emails/deliveries.py."""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from emails.outcomes import Step


@dataclass(frozen=True)
class Leased:
    """A delivery that the relay publishes."""

    id: int
    email_id: UUID
    request_id: str


@dataclass
class Lease:
    """The deliveries that a call has leased. No delivery that was due before `reached` is left."""

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
    seconds_left: float  # from the claim to the deadline
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
        """The Message-ID header.

        All attempts have the same header, so a duplicate can be detected.
        """
        domain = self.sender.rpartition("@")[2].rstrip(">")
        return f"<{self.email_id}.{self.id}@{domain}>"


@dataclass(frozen=True)
class Ended:
    """An ended attempt. `code` is the SMTP reply's code, or None without a reply."""

    id: int
    number: int
    step: Step
    code: int | None
    answer: str
    seconds: float
    suppress: bool = False  # the server replied that the recipient does not exist
