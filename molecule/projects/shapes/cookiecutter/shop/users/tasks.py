from celery import shared_task
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage

from .models import User


@shared_task
def get_users_count():
    return User.objects.count()


@shared_task
def write_media():
    return default_storage.size(default_storage.save("report.txt", ContentFile("users")))
