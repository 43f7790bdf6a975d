from celery import shared_task

from .models import Widget


@shared_task
def add(x, y):
    return x + y


@shared_task
def count_widgets():
    return Widget.objects.count()
