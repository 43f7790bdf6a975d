"""Documentation of the action plugin deploy_lock, which runs on the controller."""

DOCUMENTATION = r"""
module: deploy_lock
short_description: Hold a lock on a host until the run ends
version_added: 0.1.0
description:
  - Fails if another run of Ansible has the lock, and names its user, its controller and the time of its start.
  - The lock is released when the run ends, even if the run fails or is killed. A process on the host holds the lock only while its
    connection to the controller exists. Ansible must connect by SSH or locally.
  - Does nothing in check mode.
options:
  path: {description: The lock file on the host., type: path, required: true}
author: The maintainers of this bundle
"""

EXAMPLES = r"""
- name: Prevent other runs from deploying shop
  django_celery.stack.deploy_lock:
    path: /run/shop-deploy.lock
"""

RETURN = r"""
holder:
  description: The record of this run in the lock file.
  type: dict
  returned: success
  sample: {user: alice, controller: laptop, since: 2026-11-27 18:30:00 UTC, run: 0c1d2e3f}
"""
