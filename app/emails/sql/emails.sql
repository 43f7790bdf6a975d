-- Statements that store emails and look up their senders.

-- name: find_key
-- The API key, its owner and the owner's sending limits.
SELECT {fields} FROM emails_apikey AS k JOIN {users} AS u ON u.{primary_key} = k.owner_id
LEFT JOIN emails_sendinglimits AS l ON l.owner_id = k.owner_id
WHERE k.digest = %s

-- name: store
-- Stores an email with its deliveries and attachments, and counts it. Stores nothing if the key is
-- taken, or if a recipient is suppressed and may not be skipped. Of two concurrent requests with
-- the same key, the second waits for the first.
WITH suppressed AS (
  SELECT address FROM emails_suppression
  WHERE address = ANY (%(addresses)s)
    AND (owner_id = %(owner)s::{owner_type} OR %(owner)s::{owner_type} IS NULL AND owner_id IS NULL)
), stored AS (
  INSERT INTO emails_email (id, owner_id, sender, subject, text, html, reply_to, headers,
    show_recipients, idempotency_key, digest, request_id)
  SELECT %(id)s::uuid, %(owner)s::{owner_type}, %(sender)s::text, %(subject)s::text, %(text)s::text,
    %(html)s::text, %(reply_to)s::jsonb, %(headers)s::jsonb, %(show_recipients)s::bool,
    %(key)s::text, %(digest)s::text, %(request_id)s::text
  WHERE %(skip_suppressed)s::bool OR NOT EXISTS (SELECT FROM suppressed)
  ON CONFLICT DO NOTHING
  RETURNING id
), deliveries AS (
  INSERT INTO emails_delivery (email_id, recipient, domain, kind, state, failed_by, attempts,
    uncertain_attempts, data_sent, last_error, due_at, expires_at)
  SELECT id, recipient, domain, kind,
    CASE WHEN s.address IS NOT NULL THEN 'skipped' WHEN %(send_at)s::timestamptz IS NULL THEN 'queued'
      ELSE 'scheduled' END,
    '', 0, 0, false, '',
    CASE WHEN s.address IS NULL THEN coalesce(%(send_at)s::timestamptz, statement_timestamp()) END,
    coalesce(%(deadline)s::timestamptz, coalesce(%(send_at)s::timestamptz, statement_timestamp()) + %(lifetime)s)
  FROM stored, unnest(%(recipients)s::text[], %(addresses)s::text[], %(domains)s::text[],
        %(kinds)s::text[])
      AS named (recipient, address, domain, kind)
    LEFT JOIN suppressed AS s ON s.address = named.address
), attachments AS (
  INSERT INTO emails_attachment (email_id, filename, content_type, content, content_id)
  SELECT stored.id, file.*
  FROM stored, unnest(%(filenames)s::text[], %(content_types)s::text[],
    %(contents)s::bytea[], %(content_ids)s::text[]) AS file
), counted AS (
  INSERT INTO emails_counter (name, bucket, total, seconds)
  SELECT 'accepted', 0, %(count)s::int, 0 FROM stored
)
SELECT EXISTS (SELECT FROM stored), ARRAY (SELECT address FROM suppressed)

-- name: notify
-- The commit is asynchronous, because a lost notification only delays an email by a second.
SELECT set_config('synchronous_commit', 'off', true), pg_notify('emails_due', '')

-- name: count
INSERT INTO emails_counter (name, bucket, total, seconds) VALUES (%s, 0, %s, 0)

-- name: merge_counters
WITH merged AS (DELETE FROM emails_counter RETURNING name, bucket, total, seconds)
INSERT INTO emails_counter (name, bucket, total, seconds)
SELECT name, bucket, sum(total), sum(seconds) FROM merged GROUP BY name, bucket

-- name: lock_pace
-- Allows only one relay at a time to count the deliveries per domain.
SELECT pg_advisory_xact_lock(hashtext('emails.pace'))

-- name: under_way
-- The number of published and sending deliveries per domain.
SELECT domain, count(*) FROM emails_delivery
WHERE state IN ('queued', 'sending') AND due_at > statement_timestamp() GROUP BY domain

-- name: tokens
-- The remaining tokens per domain, and the seconds since these tokens were stored.
SELECT domain, tokens, extract(epoch FROM statement_timestamp() - updated_at)::float8
FROM emails_domainpace

-- name: spend
INSERT INTO emails_domainpace (domain, tokens, updated_at)
SELECT domain, tokens, statement_timestamp()
FROM unnest(%(domains)s::text[], %(tokens)s::float8[]) AS spent (domain, tokens)
ON CONFLICT (domain) DO UPDATE SET tokens = excluded.tokens, updated_at = excluded.updated_at

-- name: wait_for_slot
-- Waits for one slot, with a timeout.
SELECT set_config('lock_timeout', %s, true), pg_advisory_xact_lock(hashtext('emails.smtp'), %s)

-- name: take_slot
-- Takes an advisory lock for one of the SMTP connections that EMAILS_SMTP_CONNECTIONS allows.
SELECT slot FROM generate_series(1, %s) AS slot
WHERE pg_try_advisory_xact_lock(hashtext('emails.smtp'), slot) LIMIT 1
