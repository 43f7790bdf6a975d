import hmac
from contextlib import suppress
from uuid import UUID

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import ValidationError
from django.db import Error as DatabaseError
from django.db import connection
from django.db.models import Prefetch, Q
from django.db.models.functions import Left, Length
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.template.defaultfilters import pluralize
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.clickjacking import xframe_options_sameorigin
from django.views.decorators.http import require_http_methods, require_safe
from prometheus_client import CONTENT_TYPE_LATEST

from emails import listing, services
from emails.conf import conf
from emails.forms import EmailForm
from emails.metrics import exposition
from emails.models import Attachment
from emails.states import State

PAGE_SIZE = 20
# The page shows only the first characters of a text, because it reloads every few seconds.
TEXT_LIMIT = 20_000
# An email's HTML may use only inline styles: no scripts, no forms, nothing from other hosts.
HTML_POLICY = "; ".join(
    (
        "sandbox",
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def home(request: HttpRequest) -> HttpResponse:
    form = EmailForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            message = services.Message(
                subject=form.cleaned_data["subject"],
                text=form.cleaned_data["text"],
                recipients=form.cleaned_data["to"],
            )
            services.accept(request.user, message)
        except ValidationError as error:
            for field, problems in error.message_dict.items():
                form.add_error(field if field in form.fields else None, problems)
        except services.OverLimit:
            form.add_error(None, "You have reached your hourly limit of recipients.")
        else:
            messages.success(request, "Accepted and queued for delivery.")
            return redirect("home")
    state, text = request.GET.get("state", ""), request.GET.get("q", "").strip()
    if state not in State.values:
        state = ""
    found = listing.find(request.user, state=state, text=text)
    with suppress(ValueError):
        found = found.filter(pk__lt=UUID(request.GET.get("before", "")))
    found = found.order_by("-pk").defer("text", "html").prefetch_related("deliveries")
    emails = list(found[: PAGE_SIZE + 1])
    context = {
        "form": form,
        "emails": emails[:PAGE_SIZE],
        "older": emails[PAGE_SIZE - 1].pk if len(emails) > PAGE_SIZE else None,
        "state": state,
        "text": text,
        "counts": {
            name: shown(count) for name, count in listing.count_by_state(request.user, text).items()
        },
        "now": timezone.now(),
    }
    return render(request, "emails/home.html", context)


def shown(count: int | None) -> str:
    if count is None:
        return ""
    return f"{listing.COUNT_LIMIT}+" if count > listing.COUNT_LIMIT else str(count)


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def show_email(request: HttpRequest, email_id: UUID) -> HttpResponse:
    """Shows an email and its deliveries. POST retries failed ones, or cancels pending ones."""
    emails = listing.find(request.user).defer("text", "html")
    emails = emails.annotate(shown_text=Left("text", TEXT_LIMIT), text_length=Length("text"))
    emails = emails.annotate(has_html=~Q(html=""))
    attachments = Prefetch("attachments", Attachment.objects.defer("content"))
    email = get_object_or_404(emails.prefetch_related("deliveries__log", attachments), pk=email_id)
    if request.method == "POST":
        match request.POST.get("action"):
            case "replay":
                count = services.replay(email.deliveries.all())
                done = "queued for retry"
            case "cancel":
                count = services.cancel(email.deliveries.all())
                done = "cancelled"
            case _:
                return HttpResponse("action: expected replay or cancel", status=400)
        messages.success(request, f"{deliveries(count)} {done}.")
        return redirect("email", email_id)
    context = {
        "email": email,
        "cut": getattr(email, "text_length") > TEXT_LIMIT,  # noqa: B009 - annotated, no field
        "now": timezone.now(),
    }
    return render(request, "emails/email.html", context)


def deliveries(count: int) -> str:
    return f"{count} deliver{pluralize(count, 'y,ies')}"


@login_required
@never_cache
@require_safe
@xframe_options_sameorigin
def show_html(request: HttpRequest, email_id: UUID) -> HttpResponse:
    """Shows the HTML of an email, for the frame on its page."""
    email = get_object_or_404(listing.find(request.user).exclude(html="").only("html"), pk=email_id)
    return HttpResponse(
        email.html,
        headers={
            "Content-Security-Policy": HTML_POLICY,
            "X-DNS-Prefetch-Control": "off",  # hides from name servers that the email was opened
        },
    )


@never_cache
@require_safe
def healthz(request: HttpRequest) -> JsonResponse:
    """200 if the database responds, else 503. Emails are accepted even if the broker is down."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return JsonResponse({"database": "unavailable"}, status=503)
    return JsonResponse({"database": "ok"})


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Metrics for Prometheus, with METRICS_TOKEN as bearer token. Without the setting, 404."""
    if not conf.METRICS_TOKEN:
        raise Http404
    given = request.headers.get("Authorization", "").encode(errors="replace")
    if not hmac.compare_digest(given, f"Bearer {conf.METRICS_TOKEN}".encode()):
        return HttpResponse(status=401, headers={"WWW-Authenticate": "Bearer"})
    return HttpResponse(exposition(), content_type=CONTENT_TYPE_LATEST)
