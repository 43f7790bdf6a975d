"""A temporary PostgreSQL server for a test run: python -m tests.postgresql COMMAND…

Runs the programs of the installed server on a free loopback port with a temporary directory. The
command gets the server's URL as TEST_DATABASE_URL.
"""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness import free_port

USER = "mailroom"
# The server refuses to run as root.
UNPRIVILEGED = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}


def programs() -> Path:
    """The directory of the newest installed server's programs, which Debian keeps off the PATH."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    on_path = shutil.which("initdb")
    if not found and not on_path:
        sys.exit("PostgreSQL server not found; install it with tests/install")
    return found[-1] if found else Path(on_path).parent


class Postgresql:
    def __init__(self, **settings: str) -> None:
        self.bin = programs()
        self.directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self.password = secrets.token_urlsafe(16)
        self.port = free_port()
        self.started = False
        self.as_user = UNPRIVILEGED if os.geteuid() == 0 else {}
        if self.as_user:
            shutil.chown(self.directory, self.as_user["user"], self.as_user["group"])
        password_file = self.directory / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        self.run("initdb", "-U", USER, "-A", "scram-sha-256", "--pwfile", str(password_file))
        password_file.unlink()
        with (self.directory / "data/postgresql.conf").open("a") as file:
            file.write("listen_addresses = '127.0.0.1'\n")
            file.write(f"unix_socket_directories = '{self.directory}'\n")
            settings = {"max_connections": "200"} | settings
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), "-D", str(self.directory / "data"), *arguments]
        done = subprocess.run(
            command,
            **self.as_user,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            # Ctrl-C must reach only the caller, which then stops the server.
            start_new_session=True,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def start(self) -> None:
        """Uses the same port at each start.

        At the first start, another program may have taken the port.
        """
        command = ("pg_ctl", "start", "-w", "-l", str(self.directory / "log"))
        for left in (2, 1, 0):
            try:
                self.run(*command, "-o", f"-p {self.port}")
            except RuntimeError:
                if self.started or not left:
                    raise
                self.port = free_port()
            else:
                self.started = True
                return

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "stop", "-w", "-m", mode)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> "Postgresql":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop("immediate")
        shutil.rmtree(self.directory)


def main() -> int:
    # Test data does not have to survive a crash.
    with Postgresql(fsync="off") as server:
        environment = os.environ | {"TEST_DATABASE_URL": server.url()}
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
