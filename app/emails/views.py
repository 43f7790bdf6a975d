import hmac
from uuid import UUID

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.db import Error as DatabaseError
from django.db import connection
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe
from prometheus_client import CONTENT_TYPE_LATEST

from emails import listing, services
from emails.conf import conf
from emails.forms import EmailForm
from emails.metrics import exposition
from emails.states import State

PAGE_SIZE = 20


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
            form.add_error(None, "You have reached your limit of recipients within an hour.")
        else:
            messages.success(request, "Accepted. It is on its way.")
            return redirect("home")
    state, text = request.GET.get("state", ""), request.GET.get("q", "")
    if state not in State.values:
        state = ""
    emails = listing.find(request.user, state=state, text=text).prefetch_related("deliveries")
    page = Paginator(emails, PAGE_SIZE).get_page(request.GET.get("page"))
    context = {
        "form": form,
        "page": page,
        "state": state,
        "text": text,
        "counts": listing.count_by_state(request.user),
    }
    return render(request, "emails/home.html", context)


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def show_email(request: HttpRequest, email_id: UUID) -> HttpResponse:
    """Where an email stands; POST sends once more what is dead."""
    emails = listing.find(request.user).prefetch_related("deliveries__log", "attachments")
    email = get_object_or_404(emails.defer("attachments__content"), pk=email_id)
    if request.method == "POST":
        count = services.replay(email.deliveries.all())
        messages.success(request, f"{count} deliveries queued for retry.")
        return redirect("email", email_id)
    dead = any(delivery.needs_operator for delivery in email.deliveries.all())
    return render(request, "emails/email.html", {"email": email, "dead": dead})


@never_cache
@require_safe
def healthz(request: HttpRequest) -> JsonResponse:
    """200 if the database answers, else 503. The broker may be down: emails are accepted anyway."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return JsonResponse({"database": "unavailable"}, status=503)
    return JsonResponse({"database": "ok"})


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """For Prometheus, with METRICS_TOKEN as its bearer token; without one nobody sees them."""
    if not conf.METRICS_TOKEN:
        raise Http404
    given = request.headers.get("Authorization", "").encode(errors="replace")
    if not hmac.compare_digest(given, f"Bearer {conf.METRICS_TOKEN}".encode()):
        return HttpResponse(status=401, headers={"WWW-Authenticate": "Bearer"})
    return HttpResponse(exposition(), content_type=CONTENT_TYPE_LATEST)
