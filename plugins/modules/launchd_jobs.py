#!/usr/bin/python
"""Manage the launchd jobs of one owner."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.django_celery.stack.plugins.module_utils.errors import Failure
from ansible_collections.django_celery.stack.plugins.module_utils.launchd import Jobs

DOCUMENTATION = r"""
module: launchd_jobs
short_description: Manage the launchd jobs of one owner
version_added: 0.1.0
description:
  - Writes property lists, boots out and removes jobs of the same owner that are no longer listed, and loads and starts the
    others.
  - Restarts a job whose process is older than a file in its O(jobs[].restart_on). Each run compares process and files again, so
    the next run completes a run that was killed between writing a file and the restart.
  - A job whose property list changes is booted out before the new property list is written. So launchd never runs a job with an
    older property list than the one on disk. If a run is killed in between, the job is not loaded, and the next run loads it.
  - A restart is a boot-out and a load, not C(kickstart -k), which is documented to kill the job. At a boot-out, the job has its
    C(ExitTimeOut) to stop.
  - Checks that every started job keeps running. If a job exits, the module fails with the end of the job's log.
options:
  owner:
    description: The owner of the jobs. Other jobs with this owner are booted out and removed.
    type: str
    required: true
  jobs:
    description: The jobs, in the order in which they are started. A job's label is the name of its file.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The label, such as V(mailroom-web).
        type: str
        required: true
      content:
        description: The property list, as XML.
        type: str
        required: true
      pid_file:
        description:
          - The file to which the job's process writes its process ID at its start. Its modification time is the time of the start.
          - Required with O(jobs[].restart_on).
        type: path
      restart_on:
        description: Files and symbolic links. A job that started before one of them changed is restarted.
        type: list
        elements: path
        default: []
      settle:
        description: Seconds for which the job must keep running after a start.
        type: float
        default: 0
  directory:
    description: The directory of the property lists.
    type: path
    required: true
  domain:
    description: >-
      The domain of the jobs, such as V(system). If it is empty, the user's domain is used. This is C(gui/<uid>) if the user is
      logged in at the screen, otherwise C(user/<uid>).
    type: str
    default: ""
author: The maintainers of this bundle (@django-celery)
"""

EXAMPLES = r"""
- name: A web server that restarts with its release
  django_celery.stack.launchd_jobs:
    owner: mailroom/web
    directory: /Users/me/Library/LaunchAgents
    jobs:
      - name: mailroom-web
        content: |
          <?xml version="1.0" encoding="UTF-8"?>
          <plist version="1.0">
          <dict>
            <key>Label</key><string>mailroom-web</string>
            <key>ProgramArguments</key>
            <array><string>/Users/me/mailroom/bin/web</string></array>
            <key>KeepAlive</key><true/>
            <key>StandardErrorPath</key><string>/Users/me/Library/Logs/mailroom-web.log</string>
          </dict>
          </plist>
        pid_file: /Users/me/mailroom/run/web.pid
        restart_on: [/Users/me/mailroom/current]
        settle: 3

- name: Stop and remove all jobs of an owner
  django_celery.stack.launchd_jobs:
    owner: mailroom/web
    directory: /Users/me/Library/LaunchAgents
    jobs: []
"""

RETURN = r"""
started:
  description: Jobs that were not loaded or not running.
  type: list
  elements: str
  returned: always
  sample: [mailroom-web]
restarted:
  description: Jobs that ran with older files.
  type: list
  elements: str
  returned: always
  sample: []
removed:
  description: Jobs that were no longer listed.
  type: list
  elements: str
  returned: always
  sample: []
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "owner": {"type": "str", "required": True},
            "directory": {"type": "path", "required": True},
            "domain": {"type": "str", "default": ""},
            "jobs": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "content": {"type": "str", "required": True},
                    "pid_file": {"type": "path"},
                    "restart_on": {"type": "list", "elements": "path", "default": []},
                    "settle": {"type": "float", "default": 0},
                },
            },
        },
        supports_check_mode=True,
    )
    jobs = Jobs(module)
    try:
        jobs.run()
    except Failure as failure:
        module.fail_json(msg=str(failure), **jobs.result)
    module.exit_json(**jobs.result)


if __name__ == "__main__":
    main()
