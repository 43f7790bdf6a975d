"""The API: authentication and error responses. The calls are in api_….py."""

import logging
from collections.abc import Callable
from typing import Any

from django.contrib.auth.decorators import login_required
from django.core.exceptions import RequestDataTooBig, ValidationError
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import cache_control
from ninja import NinjaAPI
from ninja.errors import ValidationError as MalformedRequest
from ninja.security import HttpBearer

from emails import api_emails, api_keys, api_suppressions
from emails.api_schemas import errors_by_field
from emails.conf import conf
from emails.models import ApiKey
from emails.services import Conflict, OverLimit

OVER_LIMIT_SECONDS = 300
UNAVAILABLE_SECONDS = 5
UNAVAILABLE = (
    "Database unavailable. The email may not have been accepted; "
    "retry with the same Idempotency-Key."
)

logger = logging.getLogger(__name__)


class BearerKey(HttpBearer):
    def authenticate(self, request: HttpRequest, token: str) -> ApiKey | None:
        return api_keys.authenticate(token)


def documentation_access(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Require a sign-in for a page of the API's documentation, unless API_DOCS_PUBLIC is true."""
    for_users = login_required(view)

    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        return (view if conf.API_DOCS_PUBLIC else for_users)(request, *args, **kwargs)

    return page


api = NinjaAPI(
    title="Mailroom",
    version="1",
    urls_namespace="api",
    auth=BearerKey(),
    docs_decorator=documentation_access,
)
api.add_decorator(cache_control(no_store=True), mode="view")
api.add_router("/emails", api_emails.router, tags=["emails"])
api.add_router("/suppressions", api_suppressions.router, tags=["suppressions"])


@api.exception_handler(Conflict)
@api.exception_handler(OverLimit)
def refuse_email(request: HttpRequest, error: Conflict | OverLimit) -> HttpResponse:
    status, detail = api_emails.REFUSALS[type(error)]
    response = api.create_response(request, {"detail": detail}, status=status)
    if isinstance(error, OverLimit):
        response.headers["Retry-After"] = str(OVER_LIMIT_SECONDS)
    return response


@api.exception_handler(OperationalError)
@api.exception_handler(InterfaceError)
def database_unavailable(request: HttpRequest, error: Exception) -> HttpResponse:
    logger.error("the database is unavailable: %s", type(error).__name__)
    response = api.create_response(request, {"detail": UNAVAILABLE}, status=503)
    response.headers["Retry-After"] = str(UNAVAILABLE_SECONDS)
    return response


@api.exception_handler(RequestDataTooBig)
def request_too_large(request: HttpRequest, error: RequestDataTooBig) -> HttpResponse:
    return api.create_response(request, {"detail": "The request is too large."}, status=413)


@api.exception_handler(ValidationError)
def invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    return api.create_response(request, {"errors": error.message_dict}, status=422)


@api.exception_handler(MalformedRequest)
def malformed(request: HttpRequest, error: MalformedRequest) -> HttpResponse:
    # Pydantic locates a problem by "body", the name of the view's parameter, the field; or
    # "path", "query" or "header" and the name.
    problems = [
        (problem["loc"][2 if problem["loc"][0] == "body" else 1 :], problem["msg"])
        for problem in error.errors
    ]
    return api.create_response(request, {"errors": errors_by_field(problems)}, status=422)
