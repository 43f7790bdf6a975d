"""What the API takes and answers."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from django.http import HttpRequest
from ninja import Field, Schema
from pydantic import BeforeValidator, ConfigDict, SkipValidation
from pydantic_core import PydanticCustomError

from emails.conf import conf
from emails.models import ApiKey, Attempt, Delivery, Suppression
from emails.states import State


class Request(HttpRequest):
    """One that has passed authentication."""

    auth: ApiKey


def limit_count(attachments: Any) -> Any:
    """Refuses too many attachments before each of them is looked at."""
    if isinstance(attachments, list) and len(attachments) > conf.MAX_ATTACHMENTS:
        raise PydanticCustomError("too_many", f"must not be more than {conf.MAX_ATTACHMENTS}")
    return attachments


class AttachmentIn(Schema):
    model_config = ConfigDict(extra="forbid")

    filename: str
    content_type: str = "application/octet-stream"
    content: str = Field(description="In base64.", json_schema_extra={"format": "byte"})


class EmailIn(Schema):
    model_config = ConfigDict(extra="forbid")

    subject: str
    text: str
    html: str = ""
    sender: str = Field("", alias="from", description="An allowed sender; else the default one.")
    to: list[str] = Field(description="Each recipient gets a separate message.")
    cc: list[str] = []
    bcc: list[str] = Field([], description="Recipients that no other one is shown.")
    reply_to: list[str] = []
    headers: dict[str, str] = Field(
        {}, description="Further headers, such as List-Unsubscribe. None that the fields make."
    )
    attachments: Annotated[list[AttachmentIn], BeforeValidator(limit_count)] = []
    show_recipients: bool = Field(
        False,
        description="Whether To and Cc are shown to all, as they are if there is a cc. Else each "
        "recipient sees only its own address.",
    )
    send_at: datetime | None = Field(None, description="No attempt begins before it.")
    deadline: datetime | None = Field(
        None, description="No attempt begins after it. Later than send_at."
    )
    skip_suppressed: bool = Field(
        False, description="Whether suppressed recipients are skipped. Else they are an error."
    )


class BatchEmailIn(EmailIn):
    idempotency_key: str | None = Field(None, description="As the header Idempotency-Key.")


class BatchIn(Schema):
    model_config = ConfigDict(extra="forbid")

    # Each is validated by the view: one that is wrong doesn't stop the others.
    emails: list[SkipValidation[BatchEmailIn]]


class Accepted(Schema):
    id: UUID
    status_url: str


class Errors(Schema):
    errors: dict[str, list[str]]


class Detail(Schema):
    detail: str


def errors_by_field(problems: Iterable[tuple[Sequence[str | int], str]]) -> dict[str, list[str]]:
    """Of messages and where each belongs: a field, and perhaps an index in a list and so on."""
    errors: dict[str, list[str]] = {}
    for place, message in problems:
        errors.setdefault(str(place[0]) if place else "body", []).append(message)
    return errors


class AcceptedResult(Accepted):
    status: Literal[202]


class InvalidResult(Errors):
    status: Literal[422]


class RefusedResult(Detail):
    status: Literal[409, 429]


class BatchResults(Schema):
    results: list[AcceptedResult | InvalidResult | RefusedResult] = Field(
        description="One for each email of the request, in the same order."
    )


class AttemptOut(Schema):
    number: int
    started_at: datetime
    seconds: float
    outcome: State
    smtp_code: int | None
    answer: str


class DeliveryOut(Schema):
    recipient: str
    kind: Delivery.Kind
    state: State
    attempts: int
    uncertain_attempts: int
    next_attempt_at: datetime | None
    sent_at: datetime | None
    smtp_code: int | None = Field(alias="last_smtp_code")
    error: str = Field(alias="last_error")
    log: list[AttemptOut]

    @staticmethod
    def resolve_log(delivery: Delivery) -> list[Attempt]:
        return list(delivery.log.all())


class EmailSummary(Schema):
    id: UUID
    subject: str
    state: State
    created_at: datetime


class EmailOut(Schema):
    id: UUID
    state: State
    created_at: datetime
    recipients: list[DeliveryOut] = Field(alias="deliveries")


class EmailPage(Schema):
    emails: list[EmailSummary]
    next: UUID | None = Field(description="`before` of the next page; null on the last one.")


class Replayed(Schema):
    replayed: int


class Cancelled(Schema):
    cancelled: int


class SuppressionIn(Schema):
    model_config = ConfigDict(extra="forbid")

    address: str


class SuppressionOut(Schema):
    id: int
    address: str = Field(description="In lower case.")
    reason: Suppression.Reason
    detail: str = Field(description="The mail server's answer, if it refused the recipient.")
    created_at: datetime


class SuppressionPage(Schema):
    suppressions: list[SuppressionOut]
    next: int | None = Field(description="`before` of the next page; null on the last one.")
