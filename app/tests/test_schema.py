"""Tests with generated input that the API conforms to its OpenAPI document."""

import pytest
import schemathesis
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from mailroom.wsgi import application
from tests.conftest import KEY

# The schema does not specify the allowed senders; unknown query parameters are ignored.
NOT_IN_THE_DOCUMENT = [positive_data_acceptance, negative_data_rejection]

schema = schemathesis.openapi.from_wsgi("/api/openapi.json", application)


@pytest.fixture
def one_connection():
    """Keep the connection between requests.

    Django would close the connection, which would end the test's transaction.
    """
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    yield
    for signal in (request_started, request_finished):
        signal.connect(close_old_connections)


@pytest.mark.django_db
@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_api_conforms_to_its_document(case, api_key, one_connection):
    case.call_and_validate(
        headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=NOT_IN_THE_DOCUMENT
    )
