import os
from typing import Any

from celery import Celery, signals

from emails import celery_config

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mailroom.settings")

app = Celery("mailroom")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
celery_config.configure(app)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def keep_django_logging(**_: Any) -> None:
    """Celery does not replace Django's LOGGING if this signal has a receiver."""
