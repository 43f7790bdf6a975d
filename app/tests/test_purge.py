from datetime import timedelta

import pytest
from django.utils import timezone

from emails import tasks
from emails.models import Delivery, Email
from emails.states import State

pytestmark = pytest.mark.django_db


def test_deletes_old_finished_emails_in_batches(accept, monkeypatch):
    monkeypatch.setattr(tasks, "PURGE_BATCH", 2)
    for state in (State.SENT, State.FAILED, State.SENT, State.UNCERTAIN):
        accept().deliveries.update(state=state, due_at=None)
    waiting = accept(recipients=["bob@example.org", "eve@example.org"])
    waiting.deliveries.filter(recipient="bob@example.org").update(state=State.SENT)
    Email.objects.update(created_at=timezone.now() - timedelta(days=31))
    young = accept()
    young.deliveries.update(state=State.SENT)
    Email.objects.filter(pk=young.pk).update(created_at=timezone.now() - timedelta(days=29))

    tasks.purge()

    assert set(Email.objects.all()) == {waiting, young}
    assert Delivery.objects.count() == 3
