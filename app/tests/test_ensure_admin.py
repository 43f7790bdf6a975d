import io
import json

import pytest
from django.core.management import CommandError, call_command

from emails import api_keys
from emails.models import ApiKey

pytestmark = pytest.mark.django_db

WANTED = {"username": "root", "password": "first secret", "email": "root@example.org"}
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def ensure(monkeypatch, capsys):
    def ensure(wanted) -> str:
        text = wanted if isinstance(wanted, str) else json.dumps(wanted)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        call_command("ensure_admin")
        output = capsys.readouterr().out
        assert output.count("\n") == 1
        return output.split()[0]

    return ensure


def test_creates_a_user_and_then_changes_nothing(ensure, django_user_model):
    wanted = WANTED | {"api_key": KEY}
    assert ensure(wanted) == "created"
    user = django_user_model.objects.get(username="root")
    assert user.is_superuser and user.is_staff and user.email == "root@example.org"
    assert user.check_password("first secret")
    assert api_keys.authenticate(KEY).owner == user
    password = user.password
    assert ensure(wanted) == "unchanged"
    user.refresh_from_db()
    assert user.password == password


@pytest.mark.parametrize(
    "change", [{"password": "second secret"}, {"email": "new@example.org"}, {"api_key": KEY[::-1]}]
)
def test_updates_what_differs(ensure, change):
    wanted = WANTED | {"api_key": KEY}
    ensure(wanted)
    assert ensure(wanted | change) == "updated"
    assert ensure(wanted | change) == "unchanged"


def test_new_api_key_replaces_the_old_one(ensure):
    ensure(WANTED | {"api_key": KEY})
    ensure(WANTED | {"api_key": KEY[::-1]})
    assert api_keys.authenticate(KEY) is None
    assert api_keys.authenticate(KEY[::-1]) is not None


def test_old_api_key_is_valid_until_a_call_lacks_it(ensure):
    ensure(WANTED | {"api_key": KEY})
    rotated = WANTED | {"api_key": KEY[::-1], "old_api_key": KEY}
    assert ensure(rotated) == "updated"
    assert ensure(rotated) == "unchanged"
    assert api_keys.authenticate(KEY) and api_keys.authenticate(KEY[::-1])
    assert ensure(WANTED | {"api_key": KEY[::-1]}) == "updated"
    assert ensure(WANTED | {"api_key": KEY[::-1]}) == "unchanged"
    assert api_keys.authenticate(KEY) is None
    assert api_keys.authenticate(KEY[::-1]) is not None


def test_exchanges_the_old_and_the_new_api_key(ensure):
    ensure(WANTED | {"api_key": KEY, "old_api_key": KEY[::-1]})
    assert ensure(WANTED | {"api_key": KEY[::-1], "old_api_key": KEY}) == "updated"
    assert api_keys.authenticate(KEY) and api_keys.authenticate(KEY[::-1])


def test_repairs_manual_changes(ensure, django_user_model):
    ensure(WANTED | {"api_key": KEY})
    django_user_model.objects.update(is_active=False)
    ApiKey.objects.update(revoked=True)
    assert ensure(WANTED | {"api_key": KEY}) == "updated"
    assert api_keys.authenticate(KEY) is not None


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("{secret", "not JSON"),
        ("[]", "not a JSON object"),
        ({"username": "root"}, "missing: password"),
        (WANTED | {"password": ""}, "password: expected"),
        (WANTED | {"password": 5}, "password: expected"),
        (WANTED | {"passwort": "secret"}, "only api_key, email, old_api_key, password, username"),
        (WANTED | {"api_key": "short secret"}, "api_key: expected 32"),
        (WANTED | {"api_key": KEY, "old_api_key": "short secret"}, "old_api_key: expected 32"),
        (WANTED | {"api_key": KEY, "old_api_key": KEY}, "old_api_key: allowed only with another"),
        (WANTED | {"old_api_key": KEY}, "old_api_key: allowed only with another"),
    ],
)
def test_reports_invalid_input_in_one_line_without_the_secret(
    ensure, django_user_model, wanted, problem
):
    with pytest.raises(CommandError, match=problem) as caught:
        ensure(wanted)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not django_user_model.objects.exists()
