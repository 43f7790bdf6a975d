from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from emails import views
from emails.api import api

admin.site.site_header = admin.site.site_title = "Mailroom"
admin.site.index_title = "Administration"

urlpatterns = [
    path("", views.home, name="home"),
    path("emails/<uuid:email_id>/", views.show_email, name="email"),
    path("emails/<uuid:email_id>/html", views.show_html, name="html"),
    path(
        "login/",
        LoginView.as_view(template_name="emails/login.html", redirect_authenticated_user=True),
        name="login",
    ),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("healthz", views.healthz, name="healthz"),
    path("metrics", views.metrics, name="metrics"),
    path("api/", api.urls),
    path("admin/", admin.site.urls),
]
