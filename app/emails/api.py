import base64
import binascii
import logging
from datetime import datetime
from uuid import UUID

from django.core.exceptions import RequestDataTooBig, ValidationError
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Field, Header, NinjaAPI, Query, Schema, Status
from ninja.errors import ValidationError as MalformedRequest
from ninja.security import HttpBearer
from pydantic import ConfigDict

from emails import listing, services
from emails.models import ApiKey, Delivery
from emails.states import State
from emails.validation import File

OVER_LIMIT_SECONDS = 300


logger = logging.getLogger(__name__)


class BearerKey(HttpBearer):
    def authenticate(self, request: HttpRequest, token: str) -> ApiKey | None:
        return services.authenticate(token)


api = NinjaAPI(title="Mailroom", version="1", urls_namespace="api", auth=BearerKey())


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
    to: list[str] = Field(description="Each recipient gets a message of its own.")
    cc: list[str] = []
    bcc: list[str] = Field([], description="Recipients that no other one is shown.")
    reply_to: list[str] = []
    attachments: list[AttachmentIn] = []
    show_recipients: bool = Field(
        False,
        description="Whether To and Cc are shown to all, as they are if there is a cc. Else each "
        "recipient sees its own address only.",
    )
    deadline: datetime | None = Field(None, description="After it no attempt begins.")


class Accepted(Schema):
    id: UUID
    status_url: str


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


class DeliveryWithLog(DeliveryOut):
    log: list[AttemptOut]

    @staticmethod
    def resolve_log(delivery) -> list:
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
    recipients: list[DeliveryWithLog] = Field(alias="deliveries")


class EmailPage(Schema):
    emails: list[EmailSummary]
    next: UUID | None = Field(description="`before` of the next page; null on the last one.")


class Replayed(Schema):
    replayed: int


class Errors(Schema):
    errors: dict[str, list[str]]


class Detail(Schema):
    detail: str


@api.post(
    "/emails",
    response={
        202: Accepted,
        400: Detail,
        401: Detail,
        409: Detail,
        413: Detail,
        422: Errors,
        429: Detail,
        503: Detail,
    },
    summary="Accept an email",
    tags=["emails"],
)
def create_email(
    request: HttpRequest,
    email: EmailIn,
    idempotency_key: str | None = Header(
        None,
        alias="Idempotency-Key",
        description="Sent again with the same content it gives the first id again.",
    ),
):
    """Stores the email and answers at once; a relay and workers deliver it."""
    message = services.Message(
        subject=email.subject,
        text=email.text,
        html=email.html,
        sender=email.sender,
        recipients=email.to,
        cc=email.cc,
        bcc=email.bcc,
        reply_to=email.reply_to,
        attachments=decode(email.attachments),
        show_recipients=email.show_recipients,
        deadline=email.deadline,
    )
    accepted = services.accept(request.auth.owner, message, idempotency_key)
    path = reverse("api:get_email", args=(accepted.pk,))
    return Status(202, {"id": accepted.pk, "status_url": request.build_absolute_uri(path)})


def decode(attachments: list[AttachmentIn]) -> list[File]:
    files = []
    for number, attachment in enumerate(attachments, start=1):
        try:
            content = base64.b64decode(attachment.content, validate=True)
        except (binascii.Error, ValueError):
            error = f"attachment {number} is not base64"
            raise ValidationError({"attachments": error}) from None
        files.append(File(attachment.filename, attachment.content_type, content))
    return files


@api.get(
    "/emails",
    response={200: EmailPage, 401: Detail, 422: Errors},
    summary="List and search, the newest first",
    tags=["emails"],
)
def list_emails(
    request: HttpRequest,
    state: State | None = Query(None, description="With a delivery in this state."),
    q: str = Query("", description="Part of a subject or a recipient, or an id."),
    before: UUID | None = Query(None, description="`next` of the page before."),
    limit: int = Query(50, ge=1, le=200),
):
    found = listing.find(request.auth.owner, state=state, text=q)
    if before is not None:
        found = found.filter(pk__lt=before)
    page = list(found.order_by("-pk").prefetch_related("deliveries")[: limit + 1])
    more = len(page) > limit
    return {"emails": page[:limit], "next": page[limit - 1].pk if more else None}


@api.get(
    "/emails/{email_id}",
    response={200: EmailOut, 401: Detail, 404: Detail, 422: Errors},
    by_alias=False,
    summary="Show it, with every attempt",
    tags=["emails"],
)
def get_email(request: HttpRequest, email_id: UUID):
    emails = listing.find(request.auth.owner).prefetch_related("deliveries__log")
    return get_object_or_404(emails, pk=email_id)


@api.post(
    "/emails/{email_id}/replay",
    response={202: Replayed, 401: Detail, 404: Detail, 422: Errors},
    summary="Send once more what failed or is held back",
    tags=["emails"],
)
def replay_email(request: HttpRequest, email_id: UUID):
    email = get_object_or_404(listing.find(request.auth.owner), pk=email_id)
    return Status(202, {"replayed": services.replay(email.deliveries.all())})


@api.exception_handler(services.Conflict)
def refuse_conflict(request: HttpRequest, error: services.Conflict):
    detail = "This idempotency key belongs to an email with other content."
    return api.create_response(request, {"detail": detail}, status=409)


@api.exception_handler(services.OverLimit)
def refuse_over_limit(request: HttpRequest, error: services.OverLimit) -> HttpResponse:
    detail = "Too many recipients within an hour."
    response = api.create_response(request, {"detail": detail}, status=429)
    response.headers["Retry-After"] = str(OVER_LIMIT_SECONDS)
    return response


@api.exception_handler(OperationalError)
@api.exception_handler(InterfaceError)
def say_unavailable(request: HttpRequest, error: Exception) -> HttpResponse:
    logger.error("the database doesn't answer: %s", type(error).__name__)
    detail = "The database doesn't answer. Nothing was accepted, or try again with the same key."
    response = api.create_response(request, {"detail": detail}, status=503)
    response.headers["Retry-After"] = "5"
    return response


@api.exception_handler(RequestDataTooBig)
def refuse_too_big(request: HttpRequest, error: RequestDataTooBig):
    return api.create_response(request, {"detail": "The request is too large."}, status=413)


@api.exception_handler(ValidationError)
def refuse(request: HttpRequest, error: ValidationError):
    return api.create_response(request, {"errors": error.message_dict}, status=422)


@api.exception_handler(MalformedRequest)
def refuse_malformed(request: HttpRequest, error: MalformedRequest):
    errors: dict[str, list[str]] = {}
    for problem in error.errors:
        # Location: "body", the name of the view's parameter, the field, an index in a list; or
        # "path", "query" or "header" and the name.
        place, *names = problem["loc"]
        field = next(iter(names[1:] if place == "body" else names), "body")
        errors.setdefault(str(field), []).append(problem["msg"])
    return api.create_response(request, {"errors": errors}, status=422)
