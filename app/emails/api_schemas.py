"""The schemas of the API's requests and responses."""

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
    """An authenticated request."""

    auth: ApiKey


def limit_count(attachments: Any) -> Any:
    """Refuses too many attachments before any attachment is validated."""
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
    sender: str = Field("", alias="from", description="An allowed sender. Default: the site's.")
    to: list[str] = Field(description="Each recipient gets a separate message.")
    cc: list[str] = []
    bcc: list[str] = Field([], description="Recipients that others do not see.")
    reply_to: list[str] = []
    headers: dict[str, str] = Field(
        {}, description="Further headers, such as List-Unsubscribe. Not those of other fields."
    )
    attachments: Annotated[list[AttachmentIn], BeforeValidator(limit_count)] = []
    show_recipients: bool = Field(
        False,
        description="Whether recipients see the addresses in To and Cc. They always do if there is "
        "a cc. Otherwise each recipient sees only its own address.",
    )
    send_at: datetime | None = Field(None, description="No attempt starts before this time.")
    deadline: datetime | None = Field(
        None, description="No attempt starts after this time. Must be later than send_at."
    )
    skip_suppressed: bool = Field(
        False, description="Whether suppressed recipients are skipped. Otherwise they are an error."
    )


class BatchEmailIn(EmailIn):
    idempotency_key: str | None = Field(None, description="Like the header Idempotency-Key.")


class BatchIn(Schema):
    model_config = ConfigDict(extra="forbid")

    # The view validates each email, so that an invalid one doesn't stop the others.
    emails: list[SkipValidation[BatchEmailIn]]


class Accepted(Schema):
    id: UUID
    status_url: str


class Errors(Schema):
    errors: dict[str, list[str]]


class Detail(Schema):
    detail: str


def errors_by_field(problems: Iterable[tuple[Sequence[str | int], str]]) -> dict[str, list[str]]:
    """Groups messages by field. A problem has a location, which starts with the field."""
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
        description="One result per email of the request, in the same order."
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
    detail: str = Field(description="The mail server's reply, if it refused the recipient.")
    created_at: datetime


class SuppressionPage(Schema):
    suppressions: list[SuppressionOut]
    next: int | None = Field(description="`before` of the next page; null on the last one.")
