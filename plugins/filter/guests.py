"""Builds the objects of guests: applications of other inventories that use this environment's broker and database.

A guest has the format of an entry of `wiring_guests` in inventories/common/wiring.yml. The results have the format of the
roles' variables, such as rabbitmq_users.
"""

from __future__ import annotations


def guest_broker_users(guests):
    """Return the users of each guest: one with all permissions in its virtual host, and one for its Flower, if it has one."""
    users = []
    for guest in guests:
        everything = {"vhost": guest["name"], "configure": ".*", "write": ".*", "read": ".*"}
        users.append({"name": guest["name"], "password": guest["broker_password"], "permissions": [everything]})
        if "flower_password" in guest:
            control = r"^(celeryev(\..*)?|(.*\.)?celery\.pidbox)$"
            permissions = {"vhost": guest["name"], "configure": control, "write": control, "read": control}
            name = f"{guest['name']}-flower"
            # The tag lets Flower list all queues. It grants no permission to read messages.
            users.append({"name": name, "password": guest["flower_password"], "tags": ["monitoring"], "permissions": [permissions]})
    return users


def guest_policies(guests):
    """Return the policies of all guests, each in the virtual host of its guest."""
    return [{"vhost": guest["name"], **policy} for guest in guests for policy in guest.get("policies", [])]


def with_database(guests):
    return [guest for guest in guests if "database_password" in guest]


def guest_database_users(guests):
    """Return a user for each guest with a database."""
    return [{"name": guest["name"], "password": guest["database_password"]} for guest in with_database(guests)]


def guest_databases(guests):
    return [{"name": guest["name"], "owner": guest["name"]} for guest in with_database(guests)]


def guest_database_clients(guests):
    """Return the addresses from which each guest can log in to its database. Each guest can log in from the database's host."""
    return [
        {"database": guest["name"], "user": guest["name"], "address": address}
        for guest in with_database(guests)
        for address in ["127.0.0.1", *guest.get("addresses", [])]
    ]


class FilterModule:
    def filters(self):
        return {
            "guest_broker_users": guest_broker_users,
            "guest_database_clients": guest_database_clients,
            "guest_database_users": guest_database_users,
            "guest_databases": guest_databases,
            "guest_policies": guest_policies,
        }
