"""Tests the objects that an environment creates for the applications of other inventories."""

from __future__ import annotations

from ansible_collections.django_celery.stack.plugins.filter import guests
from helpers import MARK

SHOP = {
    "name": "shop",
    "broker_password": f"{MARK}1",
    "flower_password": f"{MARK}2",
    "database_password": f"{MARK}3",
    "addresses": ["192.0.2.7"],
    "policies": [{"name": "lazy", "pattern": ".*", "definition": {"max-length": 9}}],
}
BLOG = {"name": "blog", "broker_password": f"{MARK}4"}


def test_a_guest_has_permissions_in_its_own_virtual_host_only():
    own, flower, blog = guests.guest_broker_users([SHOP, BLOG])
    assert (own["name"], flower["name"], blog["name"]) == ("shop", "shop-flower", "blog")
    assert (own["password"], flower["password"], blog["password"]) == (f"{MARK}1", f"{MARK}2", f"{MARK}4")
    assert [[entry["vhost"] for entry in user["permissions"]] for user in (own, flower, blog)] == [["shop"], ["shop"], ["blog"]]
    assert "tags" not in own and flower["tags"] == ["monitoring"]


def test_policies_are_in_the_virtual_host_of_the_guest():
    assert guests.guest_policies([SHOP, BLOG]) == [
        {"vhost": "shop", "name": "lazy", "pattern": ".*", "definition": {"max-length": 9}},
    ]


def test_only_a_guest_with_a_password_for_it_has_a_database():
    both = [SHOP, BLOG]
    assert guests.guest_database_users(both) == [{"name": "shop", "password": f"{MARK}3"}]
    assert guests.guest_databases(both) == [{"name": "shop", "owner": "shop"}]
    assert [entry["address"] for entry in guests.guest_database_clients(both)] == ["127.0.0.1", "192.0.2.7"]
    assert {(entry["database"], entry["user"]) for entry in guests.guest_database_clients(both)} == {("shop", "shop")}
