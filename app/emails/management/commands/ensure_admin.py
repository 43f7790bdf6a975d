import json
import sys
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from emails.api_keys import hash_key
from emails.models import ApiKey

REQUIRED = {"username", "password"}
OPTIONAL = {"email", "api_key", "old_api_key"}
KEY_NAME = "ensure_admin"
OLD_KEY_NAME = "ensure_admin, old"
SHORTEST_KEY = 32


class Command(BaseCommand):
    help = (
        "Creates or updates a superuser from a JSON object on standard input, with username, "
        "password and optionally email, api_key and old_api_key, a key that is valid until a "
        "later call lacks it. Prints a line that starts with created, updated or unchanged."
    )

    def handle(self, **_: Any) -> None:
        wanted = self.read()
        with transaction.atomic():
            user, created = self.ensure_user(wanted)
            changed = self.ensure_keys(user, wanted) if "api_key" in wanted else False
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
        for name in ("api_key", "old_api_key"):
            if len(wanted.get(name, "x" * SHORTEST_KEY)) < SHORTEST_KEY:
                raise CommandError(f"{name}: expected {SHORTEST_KEY} characters or more")
        if "old_api_key" in wanted and wanted.get("api_key") in (None, wanted["old_api_key"]):
            raise CommandError("old_api_key: allowed only with another value as api_key")
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

    def ensure_keys(self, user: Any, wanted: dict[str, str]) -> bool:
        keys = {KEY_NAME: wanted["api_key"]}
        if "old_api_key" in wanted:
            keys[OLD_KEY_NAME] = wanted["old_api_key"]
        digests = {name: hash_key(key) for name, key in keys.items()}
        own = {"owner": user, "name__in": (KEY_NAME, OLD_KEY_NAME)}
        found = ApiKey.objects.filter(**own)
        if {key.name: key.digest for key in found if not key.revoked} == digests:
            return False
        for name, digest in digests.items():
            field = "api_key" if name == KEY_NAME else "old_api_key"
            if ApiKey.objects.filter(digest=digest).exclude(**own).exists():
                raise CommandError(f"{field}: another API key has the same value")
        found.filter(name=OLD_KEY_NAME).delete()
        for name, digest in digests.items():
            ApiKey.objects.update_or_create(
                owner=user, name=name, defaults={"digest": digest, "revoked": False}
            )
        return True
