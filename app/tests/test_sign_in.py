import logging

import pytest
from axes.models import AccessAttempt
from django.test import RequestFactory
from django.utils import timezone

from mailroom.middleware import client_address

WRONG = {"username": "alice", "password": "wrong"}
RIGHT = {"username": "alice", "password": "secret"}


@pytest.fixture
def attempts(settings):
    settings.AXES_FAILURE_LIMIT = 3
    return settings.AXES_FAILURE_LIMIT


@pytest.mark.attack(kind="sign-in")
@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/login/", "/admin/login/"])
def test_repeated_wrong_passwords_lock_the_user_at_this_address(client, user, attempts, path):
    for _ in range(attempts - 1):
        assert client.post(path, WRONG, REMOTE_ADDR="192.0.2.1").status_code == 200
    response = client.post(path, WRONG, REMOTE_ADDR="192.0.2.1")
    assert response.status_code == 429
    assert b"Too many attempts" in response.content
    assert b"900 seconds" in response.content
    assert client.post(path, RIGHT, REMOTE_ADDR="192.0.2.1").status_code == 429
    # Neither other users nor the same user at another address are locked.
    other = {**RIGHT, "username": "bob"}
    assert client.post(path, other, REMOTE_ADDR="192.0.2.1").status_code == 200
    assert client.post("/login/", RIGHT, REMOTE_ADDR="192.0.2.2").headers["Location"] == "/"


@pytest.mark.django_db
def test_lock_ends(client, user, attempts, settings):
    for _ in range(attempts):
        client.post("/login/", WRONG)
    assert client.post("/login/", RIGHT).status_code == 429
    AccessAttempt.objects.update(attempt_time=timezone.now() - settings.AXES_COOLOFF_TIME)
    assert client.post("/login/", RIGHT).headers["Location"] == "/"


@pytest.mark.django_db
def test_failed_sign_in_is_logged_with_user_and_address_and_without_the_password(
    client, user, caplog
):
    with caplog.at_level(logging.WARNING, logger="axes"):
        client.post("/login/", {**WRONG, "password": "a-secret-guess"}, REMOTE_ADDR="192.0.2.7")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("axes")]
    assert "alice" in line
    assert "192.0.2.7" in line
    assert "a-secret-guess" not in line


@pytest.mark.attack(kind="sign-in")
@pytest.mark.django_db
@pytest.mark.parametrize("length", [255, 256, 10_000])
def test_sign_in_with_a_long_name_fails_and_is_counted(client, attempts, length):
    for _ in range(attempts - 1):
        assert client.post("/login/", {**WRONG, "username": "a" * length}).status_code == 200
    assert client.post("/login/", {**WRONG, "username": "a" * length}).status_code == 429


@pytest.mark.attack(kind="sign-in")
@pytest.mark.parametrize(
    ("peer", "header", "expected"),
    [
        ("192.0.2.1", "198.51.100.9", "192.0.2.1"),  # not a proxy
        ("127.0.0.1", "198.51.100.9", "198.51.100.9"),
        ("127.0.0.1", "203.0.113.5, 198.51.100.9", "198.51.100.9"),  # the client sent the first
        ("", "198.51.100.9", "198.51.100.9"),  # a Unix socket
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "nonsense", "127.0.0.1"),
        ("10.1.2.3", "198.51.100.9", "198.51.100.9"),
    ],
)
def test_forwarded_address_counts_only_from_a_proxy(settings, peer, header, expected):
    from mailroom.environment import ip_network

    settings.PROXIES = [ip_network("127.0.0.0/8"), ip_network("10.1.0.0/16")]
    request = RequestFactory().get("/", REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=header)
    assert client_address(request) == expected


@pytest.mark.django_db
def test_answers_of_the_api_are_not_stored_by_caches(client):
    assert client.get("/api/emails").headers["Cache-Control"] == "no-store"
