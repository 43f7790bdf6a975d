from django.conf import settings
from django.contrib import admin
from django.http import HttpResponse
from django.templatetags.static import static
from django.urls import path
from django.utils.translation import gettext

urlpatterns = [
    path("", lambda request: HttpResponse(f"{static('css/project.css')} {gettext('Orders')}")),
    path(settings.ADMIN_URL, admin.site.urls),
]
