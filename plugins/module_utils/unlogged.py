"""A module whose arguments don't appear in the host's log."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule


class UnloggedModule(AnsibleModule):
    """AnsibleModule for nested secrets.

    Ansible logs the arguments of each module on the host. It masks a nested secret there by its text, and misses it if the text has
    line breaks, backslashes or quotes, since the log has them escaped.
    """

    def _log_invocation(self) -> None:
        self.log("Invoked")
