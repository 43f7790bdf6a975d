import re
import uuid
from collections.abc import Callable
from ipaddress import ip_address

from django.conf import settings
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


def no_store(get_response: Handler) -> Handler:
    """Forbids caches to store the API's responses, which can contain addresses and texts."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        if request.path.startswith("/api/"):
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    return middleware


def client_address(request: HttpRequest) -> str:
    """Returns the client's address. Reads X-Forwarded-For only in requests from a proxy."""
    # If Django's test client signs in without a request, the signal has no address.
    address: str = request.META.get("REMOTE_ADDR", "")
    # gunicorn leaves the address empty if the proxy connects to a Unix socket.
    if address and not any(ip_address(address) in network for network in settings.PROXIES):
        return address
    told = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()
    try:
        return str(ip_address(told))
    except ValueError:
        return address


def user_name(request: HttpRequest, credentials: dict[str, str] | None = None) -> str:
    """Returns the user name of a sign-in, truncated to the length that axes can store."""
    return str((credentials or request.POST).get("username") or "")[:255]


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
