# Imported with the package, so that shared tasks use this Celery application.
from mailroom.celery import app as celery_app

__all__ = ["celery_app"]
