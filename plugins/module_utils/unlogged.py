"""A module whose arguments don't appear in the host's log."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule


class UnloggedModule(AnsibleModule):
    """An AnsibleModule that supports nested secrets.

    Ansible logs the arguments of each module on the host. In the log, it masks a nested secret by searching for its text. If the
    text has line breaks, backslashes or quotes, the search fails, since the log escapes them.
    """

    def _log_invocation(self) -> None:
        self.log("Invoked")
