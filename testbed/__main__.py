"""Command line of the testbed: `python -m testbed --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from testbed import build, info, stack
from testbed.inventory import MAIL, inventory_directory, read
from testbed.machine import TestbedError, podman_command


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("testbed: interrupted; run `up` again to continue", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testbed", description=stack.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], None], required: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--inventory", metavar="DIR", required=required)
        sub.set_defaults(run=run)
        return sub

    command("up", "create, start or repair the hosts of an inventory", _up)
    sub = command("down", "remove the hosts of an inventory (default: all hosts of this clone)", _down, False)
    sub.add_argument("--all-of-clone", action="store_true", help="remove all hosts of this clone (the default)")
    sub.add_argument("--images", action="store_true", help="also remove unused images")
    command("status", "list the hosts of an inventory (default: all hosts of this clone)", _status, False)
    sub = command("info", "show the addresses and logins of an inventory's services", _info)
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--value", metavar="SERVICE.KEY", help="print one value only")
    sub = command("restart", "reboot a host and wait until it responds", _restart)
    sub.add_argument("host")
    sub = command("exec", "run a command on a host as root: exec … HOST -- COMMAND", _exec)
    sub.add_argument("host")
    sub.add_argument("words", nargs="+", metavar="COMMAND")
    sub = command("logs", "show the last lines of a host's journal", _logs)
    sub.add_argument("host")
    sub.add_argument("--lines", type=int, default=100)
    return parser


def _up(options: argparse.Namespace) -> None:
    stack.up(read(inventory_directory(options.inventory)))


def _down(options: argparse.Namespace) -> None:
    if options.inventory and options.all_of_clone:
        raise TestbedError("give --inventory or --all-of-clone, not both")
    # The directory may have been deleted already.
    stack.down(Path(options.inventory).resolve() if options.inventory else None)
    if options.images:
        build.remove_unused()


def _status(options: argparse.Namespace) -> None:
    stack.status(inventory_directory(options.inventory) if options.inventory else None)


def _info(options: argparse.Namespace) -> None:
    found = info.read(inventory_directory(options.inventory))
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.value:
        service, _, key = options.value.partition(".")
        print(found[service][key])
    else:
        print(info.table(found))


def _restart(options: argparse.Namespace) -> None:
    stack.restart(inventory_directory(options.inventory), options.host)


def _exec(options: argparse.Namespace) -> None:
    container = stack.find(inventory_directory(options.inventory), options.host)
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    _replace_by_podman("exec", "--interactive", *terminal, container.name, *options.words)


def _logs(options: argparse.Namespace) -> None:
    container = stack.find(inventory_directory(options.inventory), options.host)
    if container.running and container.host != MAIL:
        words = ["journalctl", "--no-pager", f"--lines={options.lines}"]
        _replace_by_podman("exec", container.name, *words)
    _replace_by_podman("logs", "--tail", str(options.lines), container.name)


def _replace_by_podman(*words: str) -> None:
    """Replace this process with a Podman command, so that the caller gets its streams, signals and exit status."""
    command = [*podman_command(), *words]
    os.execvp(command[0], command)  # noqa: S606 - a list, no shell


if __name__ == "__main__":
    sys.exit(main())
