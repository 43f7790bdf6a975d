"""/api/emails"""

import base64
import binascii
from typing import Any
from uuid import UUID

import pydantic
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Header, Query, Router, Status

from emails import listing, services
from emails.api_schemas import (
    Accepted,
    AttachmentIn,
    BatchEmailIn,
    BatchIn,
    BatchResults,
    Cancelled,
    Detail,
    EmailIn,
    EmailOut,
    EmailPage,
    Errors,
    Replayed,
    Request,
    errors_by_field,
)
from emails.conf import conf
from emails.models import Email
from emails.services import Conflict, Message, OverLimit
from emails.states import State
from emails.validation import File

REFUSALS = {
    Conflict: (409, "This idempotency key was used with other content."),
    OverLimit: (429, "Hourly limit of recipients exceeded."),
}

router = Router()


@router.post(
    "",
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
)
def create_email(
    request: Request,
    email: EmailIn,
    idempotency_key: str | None = Header(
        None,
        alias="Idempotency-Key",
        description="A repeated request with the same key and content returns the first id.",
    ),
) -> Any:
    """Stores the email for delivery and returns immediately."""
    accepted = services.accept(request.auth.owner, message(email), idempotency_key)
    return Status(202, answer(request, accepted))


@router.post(
    "/batch",
    response={200: BatchResults, 400: Detail, 401: Detail, 413: Detail, 422: Errors, 503: Detail},
    summary="Accept several emails",
)
def create_emails(request: Request, batch: BatchIn) -> Any:
    """Stores the emails in one transaction. A refused email does not stop the others."""
    if len(batch.emails) > conf.MAX_BATCH:
        raise ValidationError({"emails": f"must not be more than {conf.MAX_BATCH}"})
    submitted: list[tuple[Message, str | None]] = []
    invalid: dict[int, ValidationError | pydantic.ValidationError] = {}
    for number, entry in enumerate(batch.emails):
        try:
            email = BatchEmailIn.model_validate(entry)
            submitted.append((message(email), email.idempotency_key))
        except (ValidationError, pydantic.ValidationError) as error:
            invalid[number] = error
    stored = iter(services.accept_batch(request.auth.owner, submitted))
    results = (invalid.get(number) or next(stored) for number in range(len(batch.emails)))
    return {"results": [batch_result(request, result) for result in results]}


def batch_result(request: HttpRequest, result: Email | Exception) -> dict[str, Any]:
    match result:
        case Email():
            return {"status": 202, **answer(request, result)}
        case ValidationError():
            return {"status": 422, "errors": result.message_dict}
        case pydantic.ValidationError():
            problems = [(problem["loc"], problem["msg"]) for problem in result.errors()]
            return {"status": 422, "errors": errors_by_field(problems)}
    status, detail = REFUSALS[type(result)]
    return {"status": status, "detail": detail}


def answer(request: HttpRequest, email: Email) -> dict[str, Any]:
    path = reverse("api:get_email", args=(email.pk,))
    return {"id": email.pk, "status_url": request.build_absolute_uri(path)}


def message(email: EmailIn) -> Message:
    return Message(
        subject=email.subject,
        text=email.text,
        html=email.html,
        sender=email.sender,
        recipients=email.to,
        cc=email.cc,
        bcc=email.bcc,
        reply_to=email.reply_to,
        headers=email.headers,
        attachments=decode(email.attachments),
        show_recipients=email.show_recipients,
        send_at=email.send_at,
        deadline=email.deadline,
        skip_suppressed=email.skip_suppressed,
    )


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


@router.get(
    "",
    response={200: EmailPage, 401: Detail, 422: Errors},
    summary="List and search emails, newest first",
)
def list_emails(
    request: Request,
    state: State | None = Query(None, description="Only emails with a delivery in this state."),
    q: str = Query("", description="Part of a subject or of a recipient, or an id."),
    before: UUID | None = Query(None, description="`next` of the previous page."),
    limit: int = Query(50, ge=1, le=200),
) -> Any:
    found = listing.find(request.auth.owner, state=state, text=q)
    if before is not None:
        found = found.filter(pk__lt=before)
    page = list(found.order_by("-pk").prefetch_related("deliveries")[: limit + 1])
    more = len(page) > limit
    return {"emails": page[:limit], "next": page[limit - 1].pk if more else None}


@router.get(
    "/{email_id}",
    response={200: EmailOut, 401: Detail, 404: Detail, 422: Errors},
    by_alias=False,
    summary="Show an email with all attempts",
)
def get_email(request: Request, email_id: UUID) -> Any:
    emails = listing.find(request.auth.owner).prefetch_related("deliveries__log")
    return get_object_or_404(emails, pk=email_id)


@router.post(
    "/{email_id}/replay",
    response={202: Replayed, 401: Detail, 404: Detail, 422: Errors},
    summary="Retry the failed and held deliveries of an email",
)
def replay_email(request: Request, email_id: UUID) -> Any:
    email = get_object_or_404(listing.find(request.auth.owner), pk=email_id)
    return Status(202, {"replayed": services.replay(email.deliveries.all())})


@router.post(
    "/{email_id}/cancel",
    response={202: Cancelled, 401: Detail, 404: Detail, 422: Errors},
    summary="Cancel the deliveries of an email that no worker has started to send",
)
def cancel_email(request: Request, email_id: UUID) -> Any:
    email = get_object_or_404(listing.find(request.auth.owner), pk=email_id)
    return Status(202, {"cancelled": services.cancel(email.deliveries.all())})
