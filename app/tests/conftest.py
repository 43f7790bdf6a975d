import asyncio
import threading

import pytest
from aiosmtpd.controller import Controller

from emails import api_keys, services, smtp
from emails.models import ApiKey
from tests.harness import free_port

KEY = "a-key-of-the-tests-0123456789abcdef"
OTHER_KEY = "a-key-of-another-owner-0123456789ab"


class Mailbox:
    """An SMTP server on a loopback port: stores accepted messages, sends configured replies.

    `reply` is the reply to the message, `recipient_reply` the reply to its recipient; None closes
    the connection. While `gate` is cleared, every message waits. With `hangs_up`, the server
    closes the connection after its reply to the sender. With `lax`, it requests the message even if
    it has refused the recipient, as RFC 2920 allows.
    """

    def __init__(self, pipelining: bool) -> None:
        self.pipelining = pipelining
        self.lax = False
        self.hangs_up = False
        self.reply = "250 taken"
        self.replies = []  # used in this order, and then `reply`
        self.sender_replies = []  # used in this order, and then "250 fine"
        self.recipient_reply = "250 fine"
        self.messages = []
        self.connections = 0
        self.credentials = []
        self.waiting = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        session.host_name = hostname
        self.connections += 1
        greeting, *offers = responses
        return [greeting, "250-PIPELINING", *offers] if self.pipelining else responses

    async def handle_MAIL(self, server, session, envelope, address, options):
        reply = self.sender_replies.pop(0) if self.sender_replies else "250 fine"
        if reply is None:
            server.transport.abort()
        if self.hangs_up:
            server.transport.write(f"{reply}\r\n".encode())
            server.transport.close()
        envelope.mail_from = address
        return reply or "421 gone"

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.recipient_reply is None:
            server.transport.abort()
            return "421 gone"
        if self.lax or self.recipient_reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.recipient_reply

    async def handle_DATA(self, server, session, envelope):
        reply = self.replies.pop(0) if self.replies else self.reply
        self.waiting.set()
        while not self.gate.is_set():
            await asyncio.sleep(0.05)
        if reply is None or reply.startswith("250"):
            self.messages.append(envelope)
        if reply is None:
            server.transport.abort()
        return reply or "421 gone"


@pytest.fixture(autouse=True)
def real_smtp(settings):
    """Restores the SMTP backend, which Django's test set-up replaces with one in memory."""
    settings.EMAIL_BACKEND = "emails.backend.EmailBackend"
    yield
    smtp.close()


@pytest.fixture
def mailbox(settings, request):
    """A server with PIPELINING, unless the test's parameter disables PIPELINING."""
    box = Mailbox(pipelining=getattr(request, "param", True))
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", free_port()
    server = Controller(box, hostname=settings.EMAIL_HOST, port=settings.EMAIL_PORT)
    server.start()
    yield box
    box.gate.set()
    server.stop()


@pytest.fixture
def user(django_user_model):
    return django_user_model.objects.create_user("alice", password="secret")


@pytest.fixture
def api_key(user):
    return ApiKey.objects.create(owner=user, name="tests", digest=api_keys.hash_key(KEY))


@pytest.fixture
def other_user(django_user_model):
    user = django_user_model.objects.create_user("mallory")
    ApiKey.objects.create(owner=user, name="tests", digest=api_keys.hash_key(OTHER_KEY))
    return user


@pytest.fixture
def api(client, api_key):
    """Calls the API."""

    def call(method, path, data=None, key=KEY, **headers):
        options = {} if data is None else {"data": data, "content_type": "application/json"}
        headers = {"Authorization": f"Bearer {key}"} | headers
        return getattr(client, method)(f"/api/{path}", headers=headers, **options)

    return call


@pytest.fixture
def accept(user):
    """Accepts a valid email with the given changes."""

    def accept(owner=user, key=None, **fields):
        good = {"subject": "Hello", "text": "Body", "recipients": ["bob@example.org"]}
        return services.accept(owner, services.Message(**good | fields), key)

    return accept


@pytest.fixture
def delivery(accept):
    return accept().deliveries.get()
