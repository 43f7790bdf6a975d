import json
import sys
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from emails.api_keys import hash_key
from emails.models import ApiKey

REQUIRED = {"username", "password"}
OPTIONAL = {"email", "api_key"}
KEY_NAME = "ensure_admin"
SHORTEST_KEY = 32


class Command(BaseCommand):
    help = (
        "Creates or updates a superuser from a JSON object on standard input, with username, "
        "password and optionally email and api_key. Prints a line that starts with created, "
        "updated or unchanged."
    )

    def handle(self, **_: Any) -> None:
        wanted = self.read()
        with transaction.atomic():
            user, created = self.ensure_user(wanted)
            changed = self.ensure_key(user, wanted["api_key"]) if "api_key" in wanted else False
            changed = self.ensure_password(user, wanted["password"]) or changed
            changed = self.ensure_fields(user, wanted) or changed
        result = "created" if created else "updated" if changed else "unchanged"
        self.stdout.write(f"{result} {user.get_username()}")

    def read(self) -> dict[str, str]:
        """Reads the values from the input.

        Errors don't repeat the input, because it contains secrets.
        """
        try:
            wanted = json.load(sys.stdin)
        except ValueError:
            raise CommandError("standard input is not JSON") from None
        if not isinstance(wanted, dict):
            raise CommandError("standard input is not a JSON object")
        if missing := REQUIRED - wanted.keys():
            raise CommandError(f"missing: {', '.join(sorted(missing))}")
        if wanted.keys() - REQUIRED - OPTIONAL:
            raise CommandError(f"only {', '.join(sorted(REQUIRED | OPTIONAL))} are allowed")
        for name, value in wanted.items():
            if not isinstance(value, str) or not value:
                raise CommandError(f"{name}: expected a string that isn't empty")
        if len(wanted.get("api_key", "x" * SHORTEST_KEY)) < SHORTEST_KEY:
            raise CommandError(f"api_key: expected {SHORTEST_KEY} characters or more")
        return wanted

    def ensure_user(self, wanted: dict[str, str]) -> tuple[Any, bool]:
        return get_user_model().objects.get_or_create(username=wanted["username"])

    def ensure_password(self, user: Any, password: str) -> bool:
        if user.check_password(password):
            return False
        user.set_password(password)
        user.save(update_fields=["password"])
        return True

    def ensure_fields(self, user: Any, wanted: dict[str, str]) -> bool:
        fields: dict[str, Any] = {"is_active": True, "is_staff": True, "is_superuser": True}
        if "email" in wanted:
            fields["email"] = wanted["email"]
        changed = [name for name, value in fields.items() if getattr(user, name) != value]
        for name in changed:
            setattr(user, name, fields[name])
        user.save(update_fields=changed)
        return bool(changed)

    def ensure_key(self, user: Any, key: str) -> bool:
        digest = hash_key(key)
        if ApiKey.objects.filter(digest=digest).exclude(owner=user, name=KEY_NAME).exists():
            raise CommandError("api_key: another API key has the same value")
        found = ApiKey.objects.filter(owner=user, name=KEY_NAME).first()
        if found and found.digest == digest and not found.revoked:
            return False
        ApiKey.objects.update_or_create(
            owner=user, name=KEY_NAME, defaults={"digest": digest, "revoked": False}
        )
        return True
