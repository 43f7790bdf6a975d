import re
import uuid
from collections.abc import Callable

from django.http import HttpRequest
from django.http.response import HttpResponseBase

from emails import context

Handler = Callable[[HttpRequest], HttpResponseBase]

POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",  # icons inside the admin's and the API documentation's style sheets
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)


def content_security_policy(get_response: Handler) -> Handler:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        return response

    return middleware


def request_id(get_response: Handler) -> Handler:
    """Gives each request an id: the client's id if it is valid. Returns and logs the id."""
    sound = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def middleware(request: HttpRequest) -> HttpResponseBase:
        own = request.headers.get("X-Request-ID", "")
        number = own if sound.fullmatch(own) else uuid.uuid4().hex
        with context.bind(request_id=number):
            response = get_response(request)
        response.headers["X-Request-ID"] = number
        return response

    return middleware
