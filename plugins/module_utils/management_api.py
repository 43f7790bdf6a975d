"""A client of RabbitMQ's management API. The client waits while a broker starts, and reports errors without passwords."""

from __future__ import annotations

import json
import time
from typing import Any, Optional
from urllib.error import HTTPError, URLError

from ansible.module_utils.urls import open_url
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.masking import masked

# The time limit of one request, and the pause between two attempts to reach the API, in seconds.
REQUEST = 60
RETRY = 0.5


class NoAnswer(Failure):
    """The API did not answer in time."""


class Unauthorized(Failure):
    """The API rejects the user or the password."""


class ManagementApi:
    """The API of one node at `url`, used as one user. Requests are retried for `timeout` seconds until the node answers.

    `ca_file` has the certificate authority of an HTTPS URL.
    """

    def __init__(self, url: str, user: str, password: str, timeout: float, ca_file: Optional[str] = None) -> None:
        self.url = url
        self.user = user
        self.password = password
        self.ca_file = ca_file
        self.until = time.monotonic() + timeout

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def health(self, check: str) -> Any:
        """Return the answer of a health check, which has the status 503 if it fails."""
        return self.request("GET", f"health/checks/{check}", accepted=503)

    def post(self, path: str, data: Any) -> None:
        self.request("POST", path, data)

    def put(self, path: str, data: Any) -> None:
        self.request("PUT", path, data)

    def delete(self, path: str) -> None:
        """Delete the object at a path. It may already be deleted, manually or by an interrupted run."""
        self.request("DELETE", path)

    def request(self, method: str, path: str, data: Any = None, accepted: Optional[int] = None) -> Any:
        """Return the answer's JSON, or None if the answer is empty. `path` is below /api. `data` is sent as JSON.

        An answer with the status `accepted` is no error.
        Raises NoAnswer, Unauthorized, or Failure with the API's reason. Passwords in URIs are masked.
        """
        while True:
            try:
                with open_url(
                    f"{self.url}/api/{path}",
                    method=method,
                    data=None if data is None else json.dumps(data),
                    headers={"Content-Type": "application/json"},
                    url_username=self.user,
                    url_password=self.password,
                    force_basic_auth=True,
                    # Do not use a proxy from the host's environment: it would get the password.
                    use_proxy=False,
                    ca_path=self.ca_file,
                    timeout=REQUEST,
                ) as response:
                    text = response.read()
                    return json.loads(text) if text.strip() else None
            except HTTPError as error:
                if error.code == 404 and method == "DELETE":
                    return None
                if error.code == 401:
                    raise Unauthorized(f"The management API at {masked(self.url)} rejects {self.user}'s password.") from None
                if error.code == accepted:
                    return json.loads(error.read())
                reason = error.read().decode(errors="replace").strip()
                raise Failure(masked(f"The management API at {self.url} answered {error.code}: {reason}")) from None
            except (URLError, OSError) as error:
                if time.monotonic() > self.until:
                    raise NoAnswer(masked(f"The management API at {self.url} does not answer: {error}.")) from None
                time.sleep(RETRY)
            except json.JSONDecodeError:
                raise Failure(f"The management API at {masked(self.url)} did not answer {method} {path} with JSON.") from None
