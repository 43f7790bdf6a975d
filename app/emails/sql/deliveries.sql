-- The state machine of deliveries. Each change of state requires a previous state, so only one of
-- several processes succeeds. The statements lock rows in the order of their ids, so they don't
-- deadlock.
-- All times come from the database's clock, so the clocks of processes do not matter.

-- name: lease
-- Leases due deliveries for publishing, the oldest first. Several relays lease different rows.
-- `floor` skips index entries of finished deliveries that vacuum can't remove yet.
-- The commit is asynchronous: if it is lost, the delivery is published again, and claimed once.
-- A delivery whose worker died or whose deadline passed is returned unchanged.
WITH due AS MATERIALIZED (
  SELECT id, email_id, state, due_at, expires_at, domain, attempts, data_sent, started_at
  FROM emails_delivery
  WHERE state IN ('scheduled', 'queued', 'sending', 'deferred', 'uncertain')
    AND due_at <= statement_timestamp() AND due_at >= %(floor)s
    AND domain <> ALL (%(closed_domains)s)
  ORDER BY due_at, id
  LIMIT %(most)s
  FOR NO KEY UPDATE SKIP LOCKED
), ranked AS (
  SELECT *, row_number() OVER (PARTITION BY domain ORDER BY due_at, id) AS place
  FROM due WHERE state <> 'sending' AND expires_at > statement_timestamp()
), leased AS (
  UPDATE emails_delivery AS d
  SET state = 'queued', published_at = statement_timestamp(),
    due_at = statement_timestamp() + %(lease)s
  FROM ranked AS r, set_config('synchronous_commit', 'off', true)
  WHERE d.id = r.id
    AND r.place <= coalesce((%(allowances)s::jsonb ->> r.domain)::int, %(allowance)s)
  RETURNING d.id
)
SELECT due.id, leased.id IS NOT NULL, due.due_at, due.email_id, email.request_id, due.domain,
  due.state, due.attempts, due.data_sent, due.started_at,
  extract(epoch FROM statement_timestamp() - due.started_at)::float8,
  extract(epoch FROM due.expires_at - statement_timestamp())::float8, statement_timestamp()
FROM due LEFT JOIN leased ON leased.id = due.id JOIN emails_email AS email ON email.id = due.email_id
ORDER BY due.due_at, due.id

-- name: due_exists
SELECT EXISTS (
  SELECT FROM emails_delivery
  WHERE state IN ('scheduled', 'queued', 'sending', 'deferred', 'uncertain')
    AND due_at <= statement_timestamp() AND due_at >= %(floor)s
)

-- name: release
-- Ends the leases of deliveries that could not be published, unless a worker has the delivery.
WITH leased AS MATERIALIZED (
  SELECT id FROM emails_delivery
  WHERE id = ANY (%(ids)s) AND state = 'queued' AND published_at = %(published_at)s
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE emails_delivery AS d SET due_at = statement_timestamp(), published_at = NULL
FROM leased WHERE d.id = leased.id

-- name: requeue
-- Makes deliveries due again if they still wait for a worker.
WITH queued AS MATERIALIZED (
  SELECT id FROM emails_delivery WHERE id = ANY (%(ids)s) AND state = 'queued'
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE emails_delivery AS d SET due_at = statement_timestamp(), published_at = NULL
FROM queued WHERE d.id = queued.id

-- name: claim
-- Claims queued deliveries for sending. The commit is asynchronous: nothing is sent before the next
-- synchronous commit, which flushes this one too.
WITH queued AS MATERIALIZED (
  SELECT id FROM emails_delivery WHERE id = ANY (%(ids)s) AND state = 'queued'
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE emails_delivery AS d
SET state = 'sending', attempts = attempts + 1, data_sent = false,
  started_at = statement_timestamp(), due_at = statement_timestamp() + %(lease)s
FROM queued, emails_email AS e, set_config('synchronous_commit', 'off', true)
WHERE d.id = queued.id AND e.id = d.email_id
RETURNING d.id, d.attempts, d.recipient, d.email_id,
  extract(epoch FROM d.expires_at - statement_timestamp())::float8, e.sender, e.subject, e.text,
  e.html, e.reply_to::text, e.headers::text, e.show_recipients, e.created_at, e.request_id,
  EXISTS (SELECT FROM emails_attachment AS a WHERE a.email_id = e.id)

-- name: unclaim
-- Queues claimed deliveries again if they were not sent.
UPDATE emails_delivery AS d
SET state = 'queued', attempts = attempts - 1, data_sent = false, published_at = NULL,
  due_at = statement_timestamp()
FROM unnest(%(ids)s::bigint[], %(numbers)s::int[]) AS c (id, number)
WHERE d.id = c.id AND d.state = 'sending' AND d.attempts = c.number

-- name: record
-- Ends, logs and counts attempts; marks the next attempts, whose message is about to be sent.
-- A sent email is recorded as sent even if the lease was lost.
WITH outcome AS (
  SELECT * FROM unnest(
    %(ids)s::bigint[], %(numbers)s::int[], %(states)s::text[], %(failed_by)s::text[],
    %(waits)s::float8[], %(codes)s::smallint[], %(answers)s::text[], %(seconds)s::float8[],
    %(buckets)s::float8[], %(suppress)s::bool[]
  ) AS o (id, number, state, failed_by, wait, code, answer, seconds, bucket, suppress)
), ended AS (
  UPDATE emails_delivery AS d
  SET state = o.state, failed_by = o.failed_by, last_smtp_code = o.code,
    due_at = statement_timestamp() + o.wait * interval '1 second',
    last_error = CASE o.state WHEN 'sent' THEN '' ELSE o.answer END,
    sent_at = CASE o.state WHEN 'sent' THEN statement_timestamp() ELSE d.sent_at END,
    uncertain_attempts = d.uncertain_attempts + (o.state = 'uncertain')::int
  FROM outcome AS o
  WHERE d.id = o.id AND (
    d.state = 'sending' AND d.attempts = o.number OR o.state = 'sent' AND d.state <> 'sent'
  )
  RETURNING d.id, d.email_id, d.recipient, d.domain, d.started_at, o.number, o.state, o.code, o.answer,
    o.seconds, o.bucket, o.suppress
), logged AS (
  INSERT INTO emails_attempt
    (delivery_id, number, started_at, seconds, outcome, smtp_code, answer)
  SELECT id, number, coalesce(started_at, statement_timestamp()), seconds, state, code, answer
  FROM ended ORDER BY id
), counted AS (
  INSERT INTO emails_counter (name, bucket, total, seconds)
  SELECT 'attempts.' || state, bucket, count(*), sum(seconds) FROM ended GROUP BY state, bucket
), suppressed AS (
  INSERT INTO emails_suppression (owner_id, address, reason, detail)
  SELECT e.owner_id, lower(split_part(ended.recipient, '@', 1)) || '@' || ended.domain, 'refused',
    ended.answer
  FROM ended JOIN emails_email AS e ON e.id = ended.email_id WHERE ended.suppress
  ON CONFLICT DO NOTHING
), begun AS (
  UPDATE emails_delivery AS d SET data_sent = true
  FROM unnest(%(begin)s::bigint[], %(begin_numbers)s::int[]) AS b (id, number)
  WHERE d.id = b.id AND d.state = 'sending' AND d.attempts = b.number
  RETURNING d.id
)
SELECT id, true FROM begun UNION ALL SELECT id, false FROM ended

-- name: expire
-- Expires deliveries whose deadline has passed. The error of their last attempt stays.
WITH late AS MATERIALIZED (
  SELECT id FROM emails_delivery
  WHERE id = ANY (%(ids)s) AND expires_at <= statement_timestamp()
    AND state IN ('scheduled', 'queued', 'deferred', 'uncertain')
  ORDER BY id FOR NO KEY UPDATE
), ended AS (
  UPDATE emails_delivery AS d
  SET due_at = NULL, published_at = NULL,
    state = CASE d.state WHEN 'uncertain' THEN 'uncertain' ELSE 'failed' END,
    failed_by = CASE d.state WHEN 'uncertain' THEN '' ELSE 'deadline' END
  FROM late WHERE d.id = late.id
  RETURNING d.id
)
INSERT INTO emails_counter (name, bucket, total, seconds)
SELECT 'expired', 0, count(*), 0 FROM ended HAVING count(*) > 0

-- name: replay
-- Queues failed and held deliveries again, with a new deadline.
WITH chosen AS MATERIALIZED (
  SELECT id FROM emails_delivery
  WHERE id = ANY (%(ids)s) AND (state = 'failed' OR state = 'uncertain' AND due_at IS NULL)
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE emails_delivery AS d
SET state = 'queued', failed_by = '', due_at = statement_timestamp(), published_at = NULL,
  expires_at = statement_timestamp() + %(lifetime)s
FROM chosen WHERE d.id = chosen.id

-- name: cancel
WITH chosen AS MATERIALIZED (
  SELECT id FROM emails_delivery
  WHERE id = ANY (%(ids)s) AND state IN ('scheduled', 'queued', 'deferred')
  ORDER BY id FOR NO KEY UPDATE
)
UPDATE emails_delivery AS d SET state = 'cancelled', due_at = NULL, published_at = NULL
FROM chosen WHERE d.id = chosen.id

-- name: reset_impossible_due_times
-- Resets due times that are later than the state allows. They were set while a clock was wrong,
-- or the clock has been set back since.
UPDATE emails_delivery SET due_at = statement_timestamp(), published_at = NULL
WHERE state = 'queued' AND due_at > statement_timestamp()
    + CASE WHEN published_at IS NULL THEN interval '1 second' ELSE %(published_lease)s * 1.1 END
  OR state = 'sending' AND due_at > statement_timestamp() + %(sending_lease)s * 1.1
  OR state IN ('deferred', 'uncertain') AND due_at > statement_timestamp()
    + 1.1 * least(
        %(first_retry)s * power(2, least(greatest(attempts, 1) - 1, 16)), %(longest_retry)s
      ) * interval '1 second'

-- name: published_exists
SELECT EXISTS (
  SELECT FROM emails_delivery
  WHERE state = 'queued' AND due_at > statement_timestamp()
    AND due_at < statement_timestamp() + %(published_lease)s - %(lost_after)s
)

-- name: requeue_lost
-- Finds lost publications: RabbitMQ confirmed them, but the queue is empty, or a delivery that was
-- published a minute later has been sent already. `due_at` of a published delivery is the time of
-- publication plus the lease, so the query can use the index on it.
WITH latest AS (
  SELECT max(d.published_at) AS published_at
  FROM (SELECT delivery_id FROM emails_attempt ORDER BY id DESC LIMIT 20) AS a
    JOIN emails_delivery AS d ON d.id = a.delivery_id
), lost AS MATERIALIZED (
  SELECT id FROM emails_delivery
  WHERE state = 'queued' AND due_at > statement_timestamp()
    AND due_at < %(published_lease)s + greatest(
      CASE WHEN %(queue_is_empty)s THEN statement_timestamp() - %(lost_after)s END,
      (SELECT published_at - %(overtaken_by)s FROM latest)
    )
  ORDER BY due_at LIMIT %(most)s FOR NO KEY UPDATE SKIP LOCKED
), requeued AS (
  UPDATE emails_delivery AS d SET due_at = statement_timestamp(), published_at = NULL
  FROM lost WHERE d.id = lost.id RETURNING d.id
), counted AS (
  INSERT INTO emails_counter (name, bucket, total, seconds)
  SELECT 'republished', 0, count(*), 0 FROM requeued HAVING count(*) > 0
)
SELECT count(*) FROM requeued
