# Imported with the package, so that shared tasks publish through this app and not Celery's default.
from mailroom.celery import app as celery_app

__all__ = ["celery_app"]
