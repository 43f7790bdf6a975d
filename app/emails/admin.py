import secrets

from django.contrib import admin, messages

from emails.models import ApiKey, Delivery, Email


class ReadOnly:
    def has_add_permission(self, request, obj=None) -> bool:
        return False

    def has_change_permission(self, request, obj=None) -> bool:
        return False

    def has_delete_permission(self, request, obj=None) -> bool:
        return False


class DeliveryInline(ReadOnly, admin.TabularInline):
    model = Delivery
    extra = 0


@admin.register(Email)
class EmailAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ("id", "subject", "owner", "state", "created_at")
    list_filter = ("deliveries__state",)
    search_fields = ("id", "subject", "deliveries__recipient")
    inlines = (DeliveryInline,)

    def get_queryset(self, request):
        return super().get_queryset(request).select_related("owner").prefetch_related("deliveries")


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    list_display = ("name", "owner", "revoked", "created_at")
    list_filter = ("revoked",)

    def get_readonly_fields(self, request, obj=None):
        return ("name", "owner") if obj else ("revoked",)

    def save_model(self, request, obj, form, change) -> None:
        if not change:
            key = secrets.token_urlsafe(32)
            obj.digest = ApiKey.hash(key)
            messages.warning(request, f"The key, shown this once: {key}")
        super().save_model(request, obj, form, change)
