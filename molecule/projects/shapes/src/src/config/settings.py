import os

import dj_database_url

SECRET_KEY = os.environ["SECRET_KEY"]
ALLOWED_HOSTS = os.environ["ALLOWED_HOSTS"].split(",")
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "orders"]
MIDDLEWARE = []
ROOT_URLCONF = "config.urls"
DATABASES = {"default": dj_database_url.config()}
USE_TZ = True
CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
CELERY_RESULT_BACKEND = "rpc://"
