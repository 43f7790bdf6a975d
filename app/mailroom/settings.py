"""Settings from environment variables, which README.md lists."""

import logging
from datetime import timedelta
from pathlib import Path

from celery.schedules import crontab
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from emails.queues import CONSUMED, MAIL
from mailroom.environment import (
    address,
    boolean,
    broker_urls,
    choice,
    env,
    limits,
    networks,
    number,
    url,
    wrong,
)
from mailroom.tls import VerifiedTLS

BASE_DIR = Path(__file__).resolve().parent.parent

# --- Django -----------------------------------------------------------------------------------

DEBUG = boolean("DEBUG", False)
SECRET_KEY = env.str("SECRET_KEY", "insecure-key-for-development" if DEBUG else "")
if not SECRET_KEY:
    raise ImproperlyConfigured("environment variable SECRET_KEY: required unless DEBUG is true")
# Sessions and tokens that these keys signed are still valid.
SECRET_KEY_FALLBACKS = env.list("SECRET_KEY_FALLBACKS", default=[])

ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=[])
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", default=[])

INSTALLED_APPS = [
    "whitenoise.runserver_nostatic",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "ninja",  # serves the API documentation's scripts, which otherwise come from a CDN
    "axes",
    "emails",
]

MIDDLEWARE = [
    "mailroom.middleware.request_id",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "mailroom.middleware.content_security_policy",
    "mailroom.middleware.no_store",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    # This middleware must be the last: it replaces the response to a refused sign-in.
    "axes.middleware.AxesMiddleware",
]

ROOT_URLCONF = "mailroom.urls"
WSGI_APPLICATION = "mailroom.wsgi.application"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        # The site's error pages, and its template for the API documentation.
        "DIRS": [BASE_DIR / "mailroom" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en-gb"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_PASSWORD_VALIDATORS = [
    {
        "NAME": "django.contrib.auth.password_validation.MinimumLengthValidator",
        "OPTIONS": {"min_length": 12},
    },
    *(
        {"NAME": f"django.contrib.auth.password_validation.{name}"}
        for name in ("CommonPasswordValidator", "NumericPasswordValidator")
    ),
]
SESSION_COOKIE_AGE = number("SESSION_SECONDS", 12 * 3600)

# django-axes counts and logs failed sign-ins, on the page and in the admin. It locks the pair of
# user and address, so that a stranger can't lock a user out.
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
AXES_FAILURE_LIMIT = number("SIGN_IN_ATTEMPTS", 10)
AXES_COOLOFF_TIME = timedelta(seconds=number("SIGN_IN_LOCK_SECONDS", 900))
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_LOCKOUT_TEMPLATE = "locked.html"
AXES_RESET_ON_SUCCESS = True
AXES_USERNAME_CALLABLE = "mailroom.middleware.user_name"
AXES_CLIENT_IP_CALLABLE = "mailroom.middleware.client_address"
# Operators and programs such as fail2ban need the user's name and the address. axes never logs the
# password.
AXES_SENSITIVE_PARAMETERS: list[str] = []
# Successful sign-ins are not stored; Django stores the last one of each user.
AXES_DISABLE_ACCESS_LOG = True
# Proxies on other hosts. For a request from one of them or from this host, the client's address is
# the last address in the X-Forwarded-For header.
PROXIES = networks("PROXIES")

STATIC_URL = "/static/"
STATIC_ROOT = Path(env.str("STATIC_ROOT", str(BASE_DIR / "staticfiles")))
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}

# --- Transport security -----------------------------------------------------------------------

# HTTPS_ONLY is false only if the site is served over plain HTTP, as in a sandbox or a test.
HTTPS_ONLY = boolean("HTTPS_ONLY", not DEBUG)
SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS_ONLY
SECURE_HSTS_SECONDS = 30 * 86400 if HTTPS_ONLY else 0
# Health checks on the same machine and Prometheus on the monitoring host use plain HTTP.
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^metrics$"]
# includeSubDomains and preload are not set, because other hosts of the domain may lack HTTPS.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]

# --- Database ---------------------------------------------------------------------------------

DATABASE = url("DATABASE_URL", "", env.db_url_config, ("postgresql", "postgres"))
PREPARED_STATEMENTS = boolean("PREPARED_STATEMENTS", True)
DATABASE.setdefault("CONN_MAX_AGE", 60)
DATABASE["CONN_HEALTH_CHECKS"] = True
# Detect an unresponsive database within seconds: while connecting, while sent data is not
# acknowledged (milliseconds), and on an idle connection (the relay listens).
DATABASE["OPTIONS"] = {
    "connect_timeout": 2,
    "tcp_user_timeout": 2500,
    "keepalives_idle": 4,
    "keepalives_interval": 1,
    "keepalives_count": 3,
} | DATABASE.get("OPTIONS", {})
if PREPARED_STATEMENTS:
    # The number of executions before a statement is prepared. The ORM's statements are never
    # prepared.
    DATABASE["OPTIONS"].setdefault("prepare_threshold", 5)
DATABASES = {"default": DATABASE}

# --- Email ------------------------------------------------------------------------------------

SMTP = url(
    "EMAIL_URL",
    "smtp://localhost:25",
    env.email_url_config,
    ("smtp", "smtp+tls", "smtp+ssl", "consolemail"),
)
# Django's mail functions store emails; workers send with this backend.
EMAIL_BACKEND = "emails.backend.EmailBackend"
EMAILS_DELIVERY_BACKEND = env.str("DELIVERY_BACKEND", SMTP["EMAIL_BACKEND"])
try:
    import_string(EMAILS_DELIVERY_BACKEND)
except ImportError:
    raise wrong("DELIVERY_BACKEND", "the path of an email backend that is installed") from None
EMAIL_HOST = SMTP["EMAIL_HOST"]
EMAIL_USE_TLS = SMTP.get("EMAIL_USE_TLS", False)
EMAIL_USE_SSL = SMTP.get("EMAIL_USE_SSL", False)
EMAIL_PORT = SMTP["EMAIL_PORT"] or (465 if EMAIL_USE_SSL else 587 if EMAIL_USE_TLS else 25)
EMAIL_HOST_USER = SMTP["EMAIL_HOST_USER"]
EMAIL_HOST_PASSWORD = SMTP["EMAIL_HOST_PASSWORD"]
EMAIL_TIMEOUT = number("EMAIL_TIMEOUT", 10)

DEFAULT_FROM_EMAIL = address(
    "DEFAULT_FROM_EMAIL", env.str("DEFAULT_FROM_EMAIL", "mailroom@localhost")
)
EMAILS_ALLOWED_SENDERS = [entry.lower() for entry in env.list("ALLOWED_SENDERS", default=[])]
for entry in EMAILS_ALLOWED_SENDERS:
    address("ALLOWED_SENDERS", f"any{entry}" if entry.startswith("@") else entry)
EMAILS_MAX_RECIPIENTS = number("MAX_RECIPIENTS", 50)
EMAILS_MAX_ATTACHMENTS = number("MAX_ATTACHMENTS", 50, minimum=0)
EMAILS_MAX_EMAIL_BYTES = number("MAX_EMAIL_BYTES", 10 * 1024**2)
EMAILS_MAX_BATCH = number("MAX_BATCH", 500)
# JSON bodies contain attachments in base64. The fields of the web form are smaller than such a
# body.
DATA_UPLOAD_MAX_MEMORY_SIZE = EMAILS_MAX_EMAIL_BYTES * 2 + 65536
EMAILS_RECIPIENTS_PER_HOUR = number("RECIPIENTS_PER_HOUR", 0, minimum=0)
EMAILS_DEADLINE_SECONDS = number("DEADLINE_SECONDS", 86400)
EMAILS_RETRY_SECONDS = number("RETRY_SECONDS", 30.0, minimum=0.1)
EMAILS_UNCERTAIN_POLICY = choice("UNCERTAIN_POLICY", "resend", "hold")
EMAILS_RETENTION_DAYS = number("RETENTION_DAYS", 30)
EMAILS_RELAY_POLL_SECONDS = number("RELAY_POLL_SECONDS", 1.0, minimum=0.05)
EMAILS_RELAY_THREADS = number("RELAY_THREADS", 4)
EMAILS_SMTP_CONNECTIONS = number("SMTP_CONNECTIONS", 0, minimum=0)
EMAILS_DOMAIN_LIMITS = limits("DOMAIN_LIMITS")
EMAILS_API_DOCS_PUBLIC = boolean("API_DOCS_PUBLIC", DEBUG)
EMAILS_METRICS_TOKEN = env.str("METRICS_TOKEN", "")

# --- Celery -----------------------------------------------------------------------------------

CELERY_BROKER_URL = url(
    "BROKER_URL", "amqp://guest:guest@127.0.0.1:5672//", broker_urls, ("amqp", "amqps")
)

if CELERY_BROKER_URL.startswith("amqps"):
    BROKER_CA_FILE = env.str("BROKER_CA_FILE", "")
    CELERY_BROKER_USE_SSL = VerifiedTLS(**({"ca_certs": BROKER_CA_FILE} if BROKER_CA_FILE else {}))

CELERY_TASK_DEFAULT_QUEUE = MAIL
CELERY_TASK_QUEUES = CONSUMED
CELERY_TASK_CREATE_MISSING_QUEUES = False
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = CELERY_RESULT_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_WORKER_PREFETCH_MULTIPLIER = 4
CELERY_WORKER_MAX_TASKS_PER_CHILD = 2000
CELERY_WORKER_SEND_TASK_EVENTS = True
# Keeps the database connection. By default, Celery closes it before and after each task.
CELERY_DB_REUSE_MAX = 1000

# Seconds. The lease of a delivery is longer than the hard limit, so the task ends before the lease.
CELERY_TASK_TIME_LIMIT = number("TASK_TIME_LIMIT", 120, minimum=6)
CELERY_TASK_SOFT_TIME_LIMIT = CELERY_TASK_TIME_LIMIT * 5 // 6
EMAILS_SENDING_LEASE_SECONDS = CELERY_TASK_TIME_LIMIT * 5 // 4

CELERY_BEAT_SCHEDULE = {
    "purge": {"task": "emails.tasks.purge", "schedule": crontab(minute=17)},
}

# --- Logging ----------------------------------------------------------------------------------

LOG_LEVEL = env.str("LOG_LEVEL", "INFO").upper()
LOG_FORMAT = choice("LOG_FORMAT", "line", "json")
if LOG_LEVEL not in logging.getLevelNamesMapping():
    raise wrong("LOG_LEVEL", "DEBUG, INFO, WARNING, ERROR or CRITICAL")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "mailroom.log.OneLineFormatter",
            "format": "%(asctime)s %(levelname)s %(name)s: %(message)s",
        },
        "json": {"()": "mailroom.log.JsonFormatter"},
    },
    "filters": {
        "ids": {"()": "emails.context.AddIds"},
        "no_traceback": {"()": "mailroom.log.NoTraceback"},
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": LOG_FORMAT,
            "filters": ["ids"],
        }
    },
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    # Django's default configuration emails errors to ADMINS and colours the development log.
    "loggers": {
        "django": {"handlers": [], "propagate": True},
        "django.server": {"handlers": [], "propagate": True},
        "axes.apps": {"level": "WARNING"},  # without the line with its version at each start
        "django.security.DisallowedHost": {"filters": ["no_traceback"]},
    },
}
