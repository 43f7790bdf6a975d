import secrets
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import model_ngettext
from django.db.models import QuerySet
from django.http import HttpRequest

from emails import api_keys, services
from emails.models import ApiKey, Attempt, Delivery, Email, SendingLimits, Suppression
from emails.validation import check_address


class ReadOnly:
    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class DeliveryInline(ReadOnly, admin.TabularInline):
    model = Delivery
    extra = 0
    show_change_link = True
    fields = ("recipient", "kind", "state", "attempts", "due_at", "last_smtp_code", "last_error")


class AttemptInline(ReadOnly, admin.TabularInline):
    model = Attempt
    extra = 0


@admin.register(Email)
class EmailAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ("id", "subject", "owner", "state", "created_at")
    list_filter = ("deliveries__state", "created_at")
    search_fields = ("id", "subject", "deliveries__recipient", "request_id")
    exclude = ("digest",)
    inlines = (DeliveryInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Email]:
        return super().get_queryset(request).select_related("owner").prefetch_related("deliveries")


@admin.register(Delivery)
class DeliveryAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ("id", "recipient", "email", "state", "attempts", "last_smtp_code", "due_at")
    list_filter = ("state", "last_smtp_code", "kind")
    search_fields = ("recipient", "email__id", "email__subject")
    list_select_related = ("email",)
    inlines = (AttemptInline,)
    actions = ("replay",)

    @admin.action(description="Retry failed and held deliveries", permissions=["replay"])
    def replay(self, request: HttpRequest, queryset: QuerySet[Delivery]) -> None:
        # The list's queryset is ordered and has joins, which an UPDATE does not support.
        chosen = Delivery.objects.filter(pk__in=list(queryset.values_list("pk", flat=True)))
        count = services.replay(chosen)
        messages.success(
            request, f"{count} {model_ngettext(Delivery._meta, count)} queued for retry."
        )

    def has_replay_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("emails.replay_delivery"))


@admin.register(SendingLimits)
class SendingLimitsAdmin(admin.ModelAdmin):
    list_display = ("owner", "senders", "recipients_per_hour")
    list_select_related = ("owner",)


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    list_display = ("name", "owner", "revoked", "created_at")
    list_filter = ("revoked",)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("name", "owner") if obj else ("revoked",)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            key = secrets.token_urlsafe(32)
            obj.digest = api_keys.hash_key(key)
            messages.warning(request, f"The new key, shown only once: {key}")
        super().save_model(request, obj, form, change)


class SuppressionForm(forms.ModelForm):
    def clean_address(self) -> str:
        address: str = self.cleaned_data["address"]
        check_address(address)
        return address.lower()


@admin.register(Suppression)
class SuppressionAdmin(admin.ModelAdmin):
    form = SuppressionForm
    list_display = ("address", "owner", "reason", "created_at")
    list_filter = ("reason",)
    search_fields = ("address",)
    list_select_related = ("owner",)
