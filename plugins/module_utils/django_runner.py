"""Runs several management commands of a Django project in one process, so that the project is imported once.

The module `management_commands` passes this file's text to the project's Python, which needs only Django.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from typing import Any, Optional


def run(arguments: list[str], stdin: Optional[str]) -> dict[str, Any]:
    """Run manage.py of the working directory. Return its exit code and output."""
    out, errors = io.StringIO(), io.StringIO()
    sys.argv = ["manage.py", *arguments]
    # A command that asks a question gets no answer and fails.
    sys.stdin = io.StringIO(stdin or "")
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path("manage.py", run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                errors.write(f"{code}\n")
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": out.getvalue(), "stderr": errors.getvalue()}


def main() -> None:
    """Read commands as JSON, a list of {arguments, stdin}, until one fails. Print their results as a JSON list."""
    results_fd = os.dup(1)
    # The output of programs that a command starts must not mix with the results.
    os.dup2(2, 1)
    results = []
    for command in json.load(sys.stdin):
        results.append(run(command["arguments"], command["stdin"]))
        if results[-1]["code"]:
            break
    with open(results_fd, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
