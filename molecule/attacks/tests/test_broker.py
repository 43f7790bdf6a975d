"""Attacks on the broker: as each of its users, with the management API, and with malformed messages."""

from __future__ import annotations

import bz2
import json
import zlib

import amqp
import pytest
import requests
from amqp import exceptions
from conftest import PASSWORDS

REFUSED = (exceptions.AccessRefused, exceptions.NotAllowed, exceptions.NotFound, exceptions.PreconditionFailed)


def declare(name, **how):
    return lambda channel: channel.queue_declare(name, durable=True, auto_delete=False, **how)


def exchange(name, kind="direct", **how):
    return lambda channel: channel.exchange_declare(name, kind, durable=True, auto_delete=False, **how)


def publish(to, routing_key, **properties):
    def act(channel):
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message("x", **properties), exchange=to, routing_key=routing_key)

    return act


def consume(name):
    return lambda channel: channel.basic_consume(name, no_ack=True)


# A queue to which workers and Flower may bind.
SPY = "spy.reply.celery.pidbox"


def bind(source, routing_key="#"):
    return lambda channel: channel.queue_bind(SPY, source, routing_key)


# Actions that are forbidden for each user of the application.
EVERYBODY = {
    "declare a foreign queue": declare("orders"),
    "declare a queue that ends with a permitted name": declare("xmail.v1"),
    "declare a queue in the broker's name space": declare("amq.mine"),
    "declare an exchange": exchange("orders"),
    "declare an exchange of the broker": exchange("amq.topic.mine", "topic"),
    "declare a logging exchange": exchange("amq.rabbitmq.log", "topic"),
    "delete the default exchange": lambda channel: channel.exchange_delete("amq.topic"),
    "publish to the default exchange": publish("", "mail.v1"),
    "publish to an exchange of the broker": publish("amq.topic", "x"),
    "publish events of the broker": publish("amq.rabbitmq.event", "user.created"),
    "read the broker's events": bind("amq.rabbitmq.event"),
    "trace all messages": bind("amq.rabbitmq.trace"),
    "bind the broker's exchange": lambda channel: channel.exchange_bind("celeryev", "amq.fanout"),
    "copy all mail": bind("emails"),
    "publish as another user": publish("emails", "mail.v1", user_id="admin"),
    "change the type of a queue": declare("mail.v1", arguments={"x-queue-type": "classic"}),
    "consume a queue that does not exist": consume("orders"),
    "consume dead letters": consume("mail.dead.v1"),
    "get a dead letter": lambda channel: channel.basic_get("mail.dead.v1"),
    "purge the dead letters": lambda channel: channel.queue_purge("mail.dead.v1"),
    "publish a dead letter": publish("emails", "mail.dead.v1"),
    "publish to an unknown topic": publish("emails", "orders"),
}
# The web service, the relay and beat only publish.
PUBLISHERS = {
    "declare the mail queue": declare("mail.v1", arguments={"x-queue-type": "quorum"}),
    "declare another mail queue": declare("mail.v2"),
    "delete the mail queue": lambda channel: channel.queue_delete("mail.v1"),
    "purge the mail queue": lambda channel: channel.queue_purge("mail.v1"),
    "consume mail": consume("mail.v1"),
    "get mail": lambda channel: channel.basic_get("mail.v1"),
    "consume maintenance": consume("maintenance.v1"),
    "send mail elsewhere": lambda channel: channel.queue_unbind("mail.v1", "emails", "mail.v1"),
    "declare the exchange": exchange("emails", "topic"),
    "delete the exchange": lambda channel: channel.exchange_delete("emails"),
    "bind the exchange": lambda channel: channel.exchange_bind("emails", "celeryev"),
    "control workers": publish("celery.pidbox", ""),
    "answer for a worker": publish("reply.celery.pidbox", "x"),
    "publish an event": publish("celeryev", "worker.heartbeat"),
    "publish a delayed task": publish("celery_delayed_27", "x"),
    "consume commands for a worker": consume(SPY),
}
FORBIDDEN = {
    "mailroom": PUBLISHERS | {"publish maintenance": publish("emails", "maintenance.v1")},
    "mailroom-beat": PUBLISHERS | {"publish mail": publish("emails", "mail.v1")},
    "mailroom-monitoring": PUBLISHERS | {"publish mail": publish("emails", "mail.v1")},
    # Workers publish no tasks.
    "mailroom-worker": {
        "publish mail": publish("emails", "mail.v1"),
        "publish maintenance": publish("emails", "maintenance.v1"),
        "read events": bind("celeryev"),
        "declare a queue for events": declare("celeryev.mine"),
        "reroute with an alternate exchange": exchange("celery_delayed_mine", arguments={"alternate-exchange": "amq.topic"}),
        "dead-letter to the broker's exchange": declare("mail.v9", arguments={"x-dead-letter-exchange": "amq.topic"}),
    },
    # Flower only reads events and queues.
    "mailroom-flower": {
        "declare the mail queue": declare("mail.v2"),
        "delete the mail queue": lambda channel: channel.queue_delete("mail.v1"),
        "purge the mail queue": lambda channel: channel.queue_purge("mail.v1"),
        "consume mail": consume("mail.v1"),
        "publish mail": publish("emails", "mail.v1"),
        "publish maintenance": publish("emails", "maintenance.v1"),
        "copy mail": bind("emails", "mail.v1"),
        "send mail elsewhere": lambda channel: channel.queue_unbind("mail.v1", "emails", "mail.v1"),
        "delete the exchange": lambda channel: channel.exchange_delete("emails"),
        "publish a delayed task": publish("celery_delayed_27", "x"),
        "publish an event": publish("celeryev", "worker.heartbeat"),
        "answer for a worker": publish("reply.celery.pidbox", "x"),
        "read commands for workers": bind("celery.pidbox"),
        "reroute with an alternate exchange": exchange("celeryev.mine", arguments={"alternate-exchange": "amq.topic"}),
        "dead-letter to the broker's exchange": declare("celeryev.dlx", arguments={"x-dead-letter-exchange": "amq.topic"}),
    },
}
ACTS = [
    pytest.param(user, act, id=f"{user}: {name}") for user, acts in FORBIDDEN.items() for name, act in (EVERYBODY | acts).items()
]


@pytest.fixture(scope="module")
def spy(connect):
    """The queue SPY, so that a bind can fail only because of its source."""
    with connect("mailroom-worker") as connection:
        channel = connection.channel()
        channel.queue_declare(SPY, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        yield
        channel.queue_delete(SPY)


@pytest.mark.attack(kind="broker: permissions")
@pytest.mark.parametrize(("user", "act"), ACTS)
@pytest.mark.usefixtures("spy")
def test_user_of_the_broker_is_refused(connect, api, user, act):
    connection = connect(user)
    before = {(queue["name"], queue["type"]) for queue in api("queues/mailroom")}
    try:
        with pytest.raises(REFUSED):
            act(connection.channel())
        assert {(queue["name"], queue["type"]) for queue in api("queues/mailroom")} == before
    finally:
        connection.close()


def test_permissions_suffice_for_each_service(root, eventually, journal):
    """The other tests send mail, which needs the permissions of the relay and of the workers to consume."""
    # Celery only warns if a worker can't bind a queue for delayed messages.
    bindings = root("rabbitmqctl --quiet --vhost mailroom list_bindings source_name destination_name routing_key").stdout
    for name in ("mail.v1", "maintenance.v1"):
        assert f"emails\t{name}\t{name}\n" in bindings and f"emails\t{name}\t#.{name}\n" in bindings
    # Beat publishes once per hour.
    current = "/opt/mailroom/current"
    command = "python manage.py shell -v0 -c 'from emails.tasks import purge; purge.delay()'"
    done = root(f"set -a; cd {current}; . ./environment; . ./environment.beat; runuser -u mailroom -- venv/bin/{command}")
    assert done.rc == 0, done.stderr
    eventually(lambda: "purged " in journal("--unit=mailroom-worker@maintenance"))


LOGINS = [
    ("guest", "guest", "/"),
    ("guest", "guest", "mailroom"),
    ("admin", "", "mailroom"),
    ("admin", "admin", "mailroom"),
    ("mailroom", "", "mailroom"),
    ("mailroom", "mailroom", "mailroom"),
    ("mailroom-flower", "", "mailroom"),
    ("", "", "mailroom"),
    ("anonymous", "", "mailroom"),
    ("mailroom", None, "/"),
    ("mailroom", None, "other"),
    ("mailroom-flower", None, "/"),
    ("mailroom-worker", None, "/"),
    ("mailroom-beat", None, "/"),
    ("mailroom-worker", "mailroom-worker", "mailroom"),
    ("mailroom-monitoring", None, "/"),
    ("mailroom\0", "x", "mailroom"),
]


@pytest.mark.attack(kind="broker: logins")
@pytest.mark.parametrize(("user", "password", "vhost"), LOGINS)
def test_login_to_the_broker_is_refused(connect, user, password, vhost):
    with pytest.raises((exceptions.AccessRefused, exceptions.NotAllowed, OSError)):
        connect(user, password, vhost)


# ---- The management API ----

ANYBODY = [
    ("GET", "users"),
    ("PUT", "users/mallory"),
    ("PUT", "users/mailroom"),
    ("DELETE", "users/admin"),
    ("PUT", "permissions/mailroom/mailroom-flower"),
    ("GET", "definitions"),
    ("POST", "definitions"),
    ("PUT", "vhosts/mallory"),
    ("DELETE", "vhosts/mailroom"),
    ("PUT", "policies/mailroom/mallory"),
    ("DELETE", "policies/mailroom/mail"),
    ("PUT", "operator-policies/mailroom/mallory"),
    ("PUT", "parameters/shovel/mailroom/mallory"),
    ("PUT", "parameters/federation-upstream/mailroom/mallory"),
    ("PUT", "global-parameters/cluster_name"),
    ("DELETE", "queues/mailroom/mail.v1"),
    ("DELETE", "queues/mailroom/mail.v1/contents"),
    ("POST", "queues/mailroom/mail.v1/get"),
    ("POST", "exchanges/mailroom/emails/publish"),
    ("POST", "rebalance/queues"),
    ("PUT", "user-limits/mailroom/max-connections"),
    ("PUT", "feature-flags/khepri_db/enable"),
    ("GET", "../../../../etc/rabbitmq/rabbitmq.conf"),
]
BODY = {
    "password": "mallory-0123456789",
    "tags": "administrator",
    "configure": ".*",
    "write": ".*",
    "read": ".*",
    "pattern": ".*",
    "definition": {"max-length": 1},
    "value": {
        "src-uri": "amqp://",
        "dest-uri": "amqp://mallory.test",
        "src-queue": "mail.v1",
        "dest-queue": "x",
        "uri": "amqp://m",
    },
    "count": 1,
    "ackmode": "ack_requeue_false",
    "encoding": "auto",
    "properties": {},
    "routing_key": "mail.v1",
    "payload": "x",
    "payload_encoding": "string",
}
# The administrator's password is wrong in the last case.
CALLERS = [*FORBIDDEN, "guest", "nobody", "admin"]


@pytest.mark.attack(kind="broker: management API")
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("method", "path"), ANYBODY)
def test_management_api_refuses(url, api, variables, caller, method, path):
    passwords = {name: variables[secret] for name, secret in PASSWORDS.items() if name != "admin"}
    auth = None if caller == "nobody" else (caller, passwords.get(caller, caller))
    before = objects(api)
    answer = requests.request(method, f"{url(15672)}/api/{path}", auth=auth, json=BODY, timeout=10)
    assert answer.status_code in (400, 401, 403, 404, 405), (answer.status_code, answer.text[:300])
    assert "password_hash" not in answer.text and "default_pass" not in answer.text
    assert objects(api) == before


@pytest.mark.attack(kind="broker: management API")
@pytest.mark.parametrize("user", ["mailroom", "mailroom-worker", "mailroom-beat"])
def test_user_of_a_service_can_not_use_the_management_api(url, variables, user):
    assert requests.get(f"{url(15672)}/api/overview", auth=(user, variables[PASSWORDS[user]]), timeout=10).status_code == 401


def objects(api):
    """The objects that the calls would change."""
    definitions = api("definitions")
    for name in ("rabbit_version", "rabbitmq_version"):
        definitions.pop(name, None)
    return json.dumps(definitions, sort_keys=True)


@pytest.mark.attack(kind="broker: management API")
@pytest.mark.parametrize(
    "path", ["", "cli/rabbitmqadmin", "js/../../../../etc/passwd", "js/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "metrics"]
)
def test_management_page_serves_no_file_of_the_host(url, path):
    answer = requests.get(f"{url(15672)}/{path}", timeout=10)
    assert "root:x:0" not in answer.text and "rabbitmq_queue_messages" not in answer.text


# ---- Malformed messages ----

TASK = {
    "lang": "py",
    "task": "emails.tasks.deliver",
    "id": "11111111-1111-1111-1111-111111111111",
    "argsrepr": "",
    "kwargsrepr": "",
}
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def task(body=None, name="emails.tasks.deliver", content_type="application/json", encoding="utf-8", **headers):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return amqp.Message(
        text, content_type=content_type, content_encoding=encoding, application_headers={**TASK, "task": name, **headers}
    )


def arguments(*args, **kwargs):
    return [list(args), kwargs, EMBED]


BOMB = zlib.compress(b"[" + b" " * 150 * 2**20 + b"]")
MESSAGES = {
    "no task in the body": task({"task": "x"}),
    "list with one number": task([1]),
    "number": task(1),
    "null": task(None),
    "text": task("deliver"),
    "empty": task(b""),
    "not JSON": task(b"\x80\x04\x95 pickle"),
    "invalid UTF-8": task(b"\xff\xfe\xff"),
    "deep lists": task(b"[" * 100_000),
    "wrong charset": task(arguments(1), encoding="klingon"),
    "pickle": task(b"cos\nsystem\n(S'touch /tmp/pickled'\ntR.", content_type="application/x-python-serialize", encoding="binary"),
    "YAML": task(b"!!python/object/apply:os.system ['touch /tmp/pickled']", content_type="application/x-yaml"),
    "msgpack": task(b"\x93\x91\x01\x80\xc0", content_type="application/x-msgpack", encoding="binary"),
    "unknown content type": task(arguments(1), content_type="application/mallory"),
    "unknown task": task(arguments(1), name="emails.tasks.missing"),
    "task of the standard library": task(arguments("touch /tmp/pickled"), name="os.system"),
    "task of Celery": task(arguments(), name="celery.backend_cleanup"),
    "task that is no text": task(arguments(1), name=7),
    "no headers": amqp.Message(b"[]", content_type="application/json", content_encoding="utf-8"),
    "nothing": amqp.Message(b""),
    "text as id": task(arguments("1; DROP TABLE emails_email")),
    "negative id": task(arguments(-1)),
    "id beyond a bigint": task(arguments(2**63)),
    "fraction as id": task(arguments(1.5)),
    "true as id": task(arguments(True)),
    "keyword arguments": task(arguments(ids=[1])),
    "id of nothing": task(arguments(2**62)),
    "eta in the year 9999": task(arguments(1), eta="9999-12-31T23:59:59+00:00"),
    "eta that is no time": task(arguments(1), eta="soon"),
    "expired": task(arguments(1), expires="2000-01-01T00:00:00+00:00"),
    "zlib bomb": task(BOMB, compression="application/x-gzip"),
    "invalid zlib": task(b"no zlib", compression="application/x-gzip"),
    "bzip2 bomb": task(bz2.compress(b" " * 50 * 2**20), compression="application/x-bz2"),
    "unknown compression": task(b"x", compression="application/x-mallory"),
    "15 MiB": task(arguments("x" * 15 * 2**20)),
    "callback": task([[2**62], {}, {**EMBED, "callbacks": [{"task": "emails.tasks.send_email", "args": []}]}]),
    "chain": task([[2**62], {}, {**EMBED, "chain": [{"task": "emails.tasks.purge", "args": []}]}]),
    "reply to a foreign queue": task(arguments(2**62), reply_to="orders"),
    "many headers": task(arguments(2**62), **{f"x{number}": "y" * 100 for number in range(1000)}),
    "100,000 ids": task(arguments(*range(2**40, 2**40 + 100_000))),
}


@pytest.mark.attack(kind="broker: malformed messages")
@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_mail_is_still_sent_after_a_malformed_message(connect, api, post, mails, root, journal, eventually, message, request):
    workers = "mailroom-worker@mail mailroom-worker@maintenance"
    show = f"systemctl show --property=MainPID,NRestarts --value {workers}"
    before = root(show).stdout
    connection = connect("mailroom")
    channel = connection.channel()
    channel.confirm_select()
    channel.basic_publish_confirm(message, exchange="emails", routing_key="mail.v1")
    connection.close()
    subject = f"after {request.node.callspec.id}"
    assert post(subject=subject).status_code == 202
    eventually(lambda: len(mails(subject)) == 1)
    assert root(show).stdout == before, "a worker restarted"
    assert root("test -e /tmp/pickled").rc == 1
    said = journal("--unit=mailroom-worker@mail")
    # An attacker must not be able to fill the disk with log entries.
    assert len(said) < 20_000 + len(message.body) // 10
    # No message stays unacknowledged.
    eventually(lambda: sum(counts(root, "mail.v1")) == 0)


def counts(root, name):
    """The numbers of ready and unacknowledged messages of a queue; the management API counts with a delay."""
    table = root("rabbitmqctl --quiet --vhost mailroom list_queues name messages_ready messages_unacknowledged").stdout
    found = dict(
        (line.split()[0], [int(each) for each in line.split()[1:]]) for line in table.splitlines() if line.split()[-1].isdigit()
    )
    return found[name]


COMMANDS = [
    "shutdown",
    "pool_shrink",
    "rate_limit",
    "time_limit",
    "revoke",
    "cancel_consumer",
    "add_consumer",
    "autoscale",
    "pool_restart",
    "terminate",
    "hello",
    "election",
]


@pytest.mark.attack(kind="broker: control of workers")
@pytest.mark.parametrize("user", ["mailroom-flower", "mailroom-worker"])
@pytest.mark.parametrize("command", COMMANDS)
def test_worker_ignores_commands_that_would_stop_or_starve_it(connect, api, root, user, command, post, mails, eventually):
    show = "systemctl show --property=MainPID,NRestarts --value mailroom-worker@mail"
    before = root(show).stdout
    body = {
        "method": command,
        "arguments": {"queue": "mail.v1", "task_name": "emails.tasks.deliver", "rate_limit": "0/s", "n": 100, "max": 0, "min": 0},
        "destination": None,
        "ticket": "1",
        "reply_to": None,
    }
    with connect(user) as connection:
        channel = connection.channel()
        message = amqp.Message(json.dumps(body), content_type="application/json", content_encoding="utf-8")
        channel.basic_publish(message, exchange="celery.pidbox")
    subject = f"after {command} by {user}"
    assert post(subject=subject).status_code == 202
    eventually(lambda: len(mails(subject)) == 1)
    assert root(show).stdout == before
