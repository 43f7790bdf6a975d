"""What every email costs the database, in one statement each: look up the key of who sends it,
store it, claim it, end an attempt.

PostgreSQL changes and returns rows of several tables at once, where the ORM's way, which stays for
SQLite, takes two queries to five. A delivery cost a worker twice the processor time without them,
and a request took a third longer (medians, two cores, the server beside it). Of a request's
processor time a quarter went into making the same SELECT for its key each time.

The server reads and plans each of them once a connection. They find rows by keys, so no plan is
ever wrong for other values. That is not so for the ORM's queries, which stay as they are: the
relay's for due rows, prepared while the table is empty, read a table of 200,000 each time.
"""

from contextlib import contextmanager

import psycopg
from django.contrib.auth import get_user_model
from django.db import NotSupportedError, connection

FIND_KEY = """
SELECT FIELDS FROM emails_apikey AS k JOIN USERS AS u ON u.PRIMARY_KEY = k.owner_id
LEFT JOIN emails_allowance AS a ON a.owner_id = k.owner_id
WHERE k.digest = %s
"""

STORE = """
WITH stored AS (
  INSERT INTO emails_email (FIELDS) VALUES (VALUES_OF_FIELDS) ON CONFLICT DO NOTHING RETURNING id
), deliveries AS (
  INSERT INTO emails_delivery
    (email_id, recipient, kind, state, attempts, next_attempt_at, expires_at, last_error)
  SELECT id, recipient, kind, 'queued', 0, %(due_at)s, %(expires_at)s::timestamptz, ''
  FROM stored, unnest(%(recipients)s::text[], %(kinds)s::text[]) AS named (recipient, kind)
)
INSERT INTO emails_tally (name, bucket, slot, total, seconds)
SELECT 'accepted', 0, %(slot)s, %(count)s, 0 FROM stored
ON CONFLICT (name, bucket, slot) DO UPDATE SET total = emails_tally.total + excluded.total
"""

# This one commit needn't be on disk at once: nothing is sent before the next one is, and then both.
CLAIM = """
UPDATE emails_delivery AS d SET state = 'sending', attempts = attempts + 1, data_sent = false,
  started_at = %s, next_attempt_at = %s
FROM emails_email AS e, set_config('synchronous_commit', 'off', true)
WHERE d.id = %s AND d.state = 'queued' AND e.id = d.email_id
RETURNING FIELDS, EXISTS (SELECT FROM emails_attachment AS a WHERE a.email_id = e.id)
"""

MARK_DATA = """
UPDATE emails_delivery SET data_sent = true WHERE id = %s AND state = 'sending' AND attempts = %s
"""

RECORD = """
WITH ended AS (
  UPDATE emails_delivery SET state = %(state)s, next_attempt_at = %(due_at)s,
    last_smtp_code = %(code)s, last_error = %(error)s, sent_at = coalesce(%(sent_at)s, sent_at),
    uncertain_attempts = uncertain_attempts + %(uncertain)s
  WHERE id = %(delivery)s AND (%(whoever)s OR state = 'sending' AND attempts = %(number)s)
  RETURNING id
), logged AS (
  INSERT INTO emails_attempt
    (delivery_id, number, started_at, seconds, outcome, smtp_code, answer)
  SELECT id, %(number)s, %(started_at)s, %(seconds)s, %(state)s, %(code)s::smallint,
    %(answer)s FROM ended
)
INSERT INTO emails_tally (name, bucket, slot, total, seconds)
SELECT %(tally)s, %(bucket)s, %(slot)s, 1, %(seconds)s FROM ended
ON CONFLICT (name, bucket, slot) DO UPDATE SET
  total = emails_tally.total + 1, seconds = emails_tally.seconds + excluded.seconds
"""

# A lost one costs a second's wait, so its commit needn't be on disk before the request is answered.
NOTIFY = "SELECT set_config('synchronous_commit', 'off', true), pg_notify(%s, '')"


@contextmanager
def execute(statement: str, values):
    """A cursor that has run it."""
    try:
        cursor = run(statement, values)
    except NotSupportedError:
        # A migration has changed a column's type since the server planned it; nothing was done.
        if connection.in_atomic_block:
            raise
        connection.close()
        cursor = run(statement, values)
    with cursor:
        yield cursor


def run(statement: str, values):
    """By psycopg's own cursor: Django's pastes the values into the text, so that the server would
    meet another statement each time. Django's wrapper stays around it."""
    cursor = connection.cursor()
    cursor.cursor = psycopg.Cursor(cursor.connection)
    cursor.execute(statement, values)
    return cursor


def columns(model, alias: str) -> str:
    return ", ".join(f'{alias}."{field.column}"' for field in model._meta.concrete_fields)


def instance(model, values):
    """As a QuerySet makes one of a row: `values` in the order of the model's fields."""
    fields = model._meta.concrete_fields
    return model.from_db(
        connection.alias,
        [field.attname for field in fields],
        [
            field.from_db_value(value, None, connection)
            if hasattr(field, "from_db_value")
            else value
            for field, value in zip(fields, values, strict=True)
        ],
    )


def find_key(digest: str):
    """The API key, its owner and the owner's allowance with it; None if there is none."""
    from emails.models import Allowance, ApiKey  # they need this module

    User = get_user_model()
    fields = f"{columns(ApiKey, 'k')}, {columns(User, 'u')}, {columns(Allowance, 'a')}"
    statement = FIND_KEY.replace("FIELDS", fields).replace("USERS", f'"{User._meta.db_table}"')
    statement = statement.replace("PRIMARY_KEY", f'"{User._meta.pk.column}"')
    with execute(statement, (digest,)) as cursor:
        row = cursor.fetchone()
    if row is None:
        return None
    users = len(ApiKey._meta.concrete_fields)
    allowances = users + len(User._meta.concrete_fields)
    key = instance(ApiKey, row[:users])
    key.owner = instance(User, row[users:allowances])
    own = None if row[allowances] is None else instance(Allowance, row[allowances:])
    Allowance._meta.get_field("owner").remote_field.set_cached_value(key.owner, own)
    return key


def store(email, kinds: dict[str, str], **values) -> bool:
    """Stores email and deliveries and counts them; false, and nothing done, if its key is taken."""
    fields = {field.column: field for field in email._meta.concrete_fields}
    for column, field in fields.items():
        values[column] = field.get_db_prep_save(getattr(email, field.attname), connection)
    values |= {"recipients": list(kinds), "kinds": list(kinds.values()), "count": len(kinds)}
    statement = STORE.replace("VALUES_OF_FIELDS", ", ".join(f"%({name})s" for name in fields))
    statement = statement.replace("FIELDS", ", ".join(f'"{name}"' for name in fields))
    with execute(statement, values) as cursor:
        return cursor.rowcount == 1


def claim(pk: int, now, lease_until):
    """The delivery, its email with it, in state sending; None if it doesn't wait to be sent."""
    from emails.models import Delivery, Email  # they need this module

    fields = f"{columns(Delivery, 'd')}, {columns(Email, 'e')}"
    with execute(CLAIM.replace("FIELDS", fields), (now, lease_until, pk)) as cursor:
        row = cursor.fetchone()
    if row is None:
        return None
    count = len(Delivery._meta.concrete_fields)
    delivery = instance(Delivery, row[:count])
    delivery.email = instance(Email, row[count:-1])
    delivery.has_attachments = row[-1]
    return delivery


def mark_data(pk: int, attempts: int) -> bool:
    """Notes that the message itself is about to go; false if the delivery isn't ours any more."""
    with execute(MARK_DATA, (pk, attempts)) as cursor:
        return cursor.rowcount == 1


def record(**values) -> bool:
    """Ends an attempt, logs and counts it; false, and nothing done, if it isn't ours any more."""
    with execute(RECORD, values) as cursor:
        return cursor.rowcount == 1


def notify(channel: str) -> None:
    with execute(NOTIFY, (channel,)):
        pass
