"""The project's settings with a fixed environment, independent of the developer's shell."""

import os

os.environ.update(
    DEBUG="false",
    SECRET_KEY="only-for-tests",
    ALLOWED_HOSTS="testserver,localhost",
    HTTPS_ONLY="false",
    DATABASE_URL=os.environ["TEST_DATABASE_URL"],
    BROKER_URL="amqp://guest:guest@127.0.0.1:1//",  # nobody listens there
    EMAIL_URL="smtp://127.0.0.1:1",
    EMAIL_TIMEOUT="2",
    DEFAULT_FROM_EMAIL="Mailroom <mailroom@example.org>",
    API_DOCS_PUBLIC="true",
    ALLOWED_SENDERS="news@example.com,@example.net",
    MAX_RECIPIENTS="3",
    LOG_LEVEL="INFO",
)
for name in (
    *("STATIC_ROOT", "TASK_TIME_LIMIT", "RETENTION_DAYS", "RELAY_POLL_SECONDS", "RELAY_THREADS"),
    *("DELIVERY_BACKEND", "UNCERTAIN_POLICY", "RETRY_SECONDS", "DEADLINE_SECONDS", "LOG_FORMAT"),
    *("MAX_EMAIL_BYTES", "RECIPIENTS_PER_HOUR", "METRICS_TOKEN", "PREPARED_STATEMENTS"),
    *("MAX_ATTACHMENTS", "MAX_BATCH", "SMTP_CONNECTIONS", "DOMAIN_LIMITS"),
):
    os.environ.pop(name, None)

from mailroom.settings import *  # noqa: E402, F403

STORAGES["staticfiles"]["BACKEND"] = "django.contrib.staticfiles.storage.StaticFilesStorage"  # noqa: F405
MIDDLEWARE.remove("whitenoise.middleware.WhiteNoiseMiddleware")  # noqa: F405
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
LOGGING["loggers"]["mail.log"] = {"level": "ERROR"}  # noqa: F405 - aiosmtpd logs the dialogue
