from demoapp.models import Widget
from django.http import HttpResponse
from django.urls import path

urlpatterns = [path("", lambda request: HttpResponse(f"{Widget.objects.count()} widgets"))]
