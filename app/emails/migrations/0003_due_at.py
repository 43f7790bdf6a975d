from django.db import migrations
from django.db.models import F, Q
from django.utils import timezone

FINISHED = Q(state__in=("sent", "failed"))


def one_time_of_two(apps, schema_editor) -> None:
    """What was the later of next_attempt_at and lease_until is due_at; what is done has none."""
    deliveries = apps.get_model("emails", "Delivery").objects.using(schema_editor.connection.alias)
    deliveries.filter(FINISHED).update(due_at=None)
    deliveries.filter(~FINISHED, lease_until__gt=F("due_at")).update(due_at=F("lease_until"))


def back(apps, schema_editor) -> None:
    deliveries = apps.get_model("emails", "Delivery").objects.using(schema_editor.connection.alias)
    deliveries.filter(state="uncertain").update(state="deferred")
    deliveries.filter(due_at=None).update(due_at=timezone.now())


class Migration(migrations.Migration):
    dependencies = [("emails", "0002_delivery_service")]

    operations = [migrations.RunPython(one_time_of_two, back)]
