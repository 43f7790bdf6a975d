from datetime import datetime
from uuid import UUID

from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.urls import reverse
from ninja import Field, NinjaAPI, Schema, Status
from ninja.errors import ValidationError as MalformedRequest
from ninja.security import HttpBearer
from pydantic import ConfigDict

from emails import services
from emails.models import ApiKey, Email, State


class BearerKey(HttpBearer):
    def authenticate(self, request: HttpRequest, token: str) -> ApiKey | None:
        return ApiKey.authenticate(token)


api = NinjaAPI(title="Mailroom", version="1", urls_namespace="api", auth=BearerKey())


class EmailIn(Schema):
    model_config = ConfigDict(extra="forbid")

    subject: str
    text: str
    html: str = ""
    sender: str = Field("", alias="from", description="An allowed sender; else the default one.")
    to: list[str] = Field(description="Each recipient gets a message of its own.")


class Accepted(Schema):
    id: UUID
    status_url: str


class DeliveryOut(Schema):
    recipient: str
    state: State
    attempts: int
    next_attempt_at: datetime | None
    sent_at: datetime | None
    smtp_code: int | None = Field(alias="last_smtp_code")
    error: str = Field(alias="last_error")

    @staticmethod
    def resolve_next_attempt_at(delivery) -> datetime | None:
        return delivery.next_attempt_at if delivery.state == State.DEFERRED else None


class EmailOut(Schema):
    id: UUID
    state: State
    created_at: datetime
    recipients: list[DeliveryOut] = Field(alias="deliveries")


class Errors(Schema):
    errors: dict[str, list[str]]


@api.post(
    "/emails", response={202: Accepted, 422: Errors}, summary="Accept an email", tags=["emails"]
)
def create_email(request: HttpRequest, email: EmailIn):
    """Stores the email and answers at once; a relay and workers deliver it."""
    accepted = services.accept(
        request.auth.owner,
        subject=email.subject,
        text=email.text,
        html=email.html,
        sender=email.sender,
        recipients=email.to,
    )
    path = reverse("api:get_email", args=(accepted.pk,))
    return Status(202, {"id": accepted.pk, "status_url": request.build_absolute_uri(path)})


@api.get(
    "/emails/{uuid:email_id}", response=EmailOut, by_alias=False, summary="Show it", tags=["emails"]
)
def get_email(request: HttpRequest, email_id: UUID):
    emails = Email.objects.filter(owner=request.auth.owner).prefetch_related("deliveries")
    return get_object_or_404(emails, pk=email_id)


@api.exception_handler(ValidationError)
def refuse(request: HttpRequest, error: ValidationError):
    return api.create_response(request, {"errors": error.message_dict}, status=422)


@api.exception_handler(MalformedRequest)
def refuse_malformed(request: HttpRequest, error: MalformedRequest):
    errors: dict[str, list[str]] = {}
    for problem in error.errors:
        # Location: "body", the name of the view's parameter, the field, an index in a list.
        field = next(iter(problem["loc"][2:]), "body")
        errors.setdefault(str(field), []).append(problem["msg"])
    return api.create_response(request, {"errors": errors}, status=422)
