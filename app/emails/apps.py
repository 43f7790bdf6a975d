from django.apps import AppConfig
from django.conf import settings

# For a project that adds the app to its own: what mailroom/settings.py reads from the environment.
DEFAULTS = {
    "DELIVERY_BACKEND": "django.core.mail.backends.smtp.EmailBackend",
    "EMAIL_TIMEOUT": 10,
    "ALLOWED_SENDERS": [],
    "MAX_RECIPIENTS": 50,
    "MAX_EMAIL_BYTES": 10 * 1024**2,
    "RECIPIENTS_PER_HOUR": 0,
    "DEADLINE_SECONDS": 86400,
    "RETRY_SECONDS": 30,
    "UNCERTAIN_POLICY": "resend",
    "RETENTION_DAYS": 30,
    "RELAY_POLL_SECONDS": 1.0,
    "RELAY_THREADS": 4,
    "SENDING_LEASE_SECONDS": 600,
    "METRICS_TOKEN": "",
}


class EmailsConfig(AppConfig):
    name = "emails"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        for name, value in DEFAULTS.items():
            if getattr(settings, name, None) is None:
                setattr(settings, name, value)
