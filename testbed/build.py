"""The images of the hosts and of the mail catcher, built once a machine and then shared.

An image's tag is the hash of everything it is made of, so a change makes a new image, and clones
with the same folder `images/` share theirs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from testbed import machine
from testbed.inventory import MAIL, MAIL_PLATFORM, PLATFORMS, Host
from testbed.machine import TestbedError, podman
from testbed.progress import run_long, say

# Raise it when this file makes something else of the same inputs.
RECIPE = 1

DEBIAN_SUITES = {"debian13": "trixie"}


@dataclass(frozen=True)
class Image:
    """An image to be: a folder of `images/`, the files added to it, and what it starts from.

    `base` is a published reference, another Image, or None: a root made by mmdebstrap.
    """

    platform: str
    base: str | Image | None
    added: tuple[tuple[str, str], ...] = ()  # (path in the build directory, text)

    @property
    def reference(self) -> str:
        """The local name of the image; its tag is the hash of all inputs."""
        digest = hashlib.sha256()
        base = self.base.reference if isinstance(self.base, Image) else self.base
        digest.update(json.dumps([RECIPE, self.platform, base, self.added]).encode())
        folder = PLATFORMS / self.platform
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
        return _reference(self.platform, digest)


def _reference(name: str, digest: hashlib._Hash) -> str:
    return f"localhost/testbed/{name}:{digest.hexdigest()[:12]}"


def image_of(host: Host) -> Image:
    """Return the image that `host` runs, whether it is there yet or not."""
    if host.platform == MAIL:
        return Image(MAIL, image_of(Host("", MAIL_PLATFORM, {}, host.base_image)))
    if host.platform in DEBIAN_SUITES:
        added = _apt_files(DEBIAN_SUITES[host.platform])
        return Image(host.platform, host.base_image, added)
    return Image(host.platform, host.base_image)


def ensure(image: Image) -> None:
    """Build `image` and what it stands on, unless it is there.

    Raises TestbedError when a step of the build fails.
    """
    name = image.platform
    if _exists(image.reference):
        return
    with machine.lock(f"image-{name}", f"waiting for another process to build the {name} image"):
        if _exists(image.reference):
            return
        if isinstance(image.base, Image):
            ensure(image.base)
        with machine.scratch_directory() as directory:
            _build(image, directory)
    say(name, f"image {image.reference} is ready")


def _exists(reference: str) -> bool:
    return podman("image", "exists", reference, check=False).returncode == 0


def _build(image: Image, directory: Path) -> None:
    shutil.copytree(PLATFORMS / image.platform, directory, dirs_exist_ok=True)
    for name, text in image.added:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    if isinstance(image.base, Image):
        base = image.base.reference
    elif image.base:
        base = image.base
    else:
        base = _bootstrap(image, directory)
    if image.platform == MAIL:
        _fetch_node_modules(directory, base)
    run_long(
        image.platform,
        f"building the image on {base}",
        [
            *machine.podman_command(), "build", *machine.build_options(), "--layers=false",
            "--build-arg", f"BASE={base}", "--tag", image.reference,
            "--file", str(directory / "Containerfile"), str(directory),
        ],
    )  # fmt: skip


def _bootstrap(image: Image, directory: Path) -> str:
    """Import a minimal Debian root made with mmdebstrap; return its reference."""
    platform = image.platform
    packages = (PLATFORMS / platform / "packages").read_text().split()
    inputs = json.dumps([RECIPE, platform, packages, image.added])
    base = _reference(f"{platform}-base", hashlib.sha256(inputs.encode()))
    if _exists(base):
        return base
    if platform not in DEBIAN_SUITES:
        raise TestbedError(f"{platform}: set testbed_image, a base cannot be made here")
    if not shutil.which("mmdebstrap"):
        raise TestbedError(
            "mmdebstrap not found: run testbed/install, or set testbed_image to a published image"
        )
    archive = directory.with_suffix(".tar")
    added = dict(image.added)
    settings = ["Acquire::Retries 3;", *added.get("apt/settings", "").splitlines()]
    command = [
        "mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}",
        *(f"--aptopt={setting}" for setting in settings if "CaInfo" not in setting),
        DEBIAN_SUITES[platform], str(archive),
    ]  # fmt: skip
    if added.get("apt/sources"):
        sources = directory / "bootstrap.sources"
        sources.write_text(added["apt/sources"])
        command.append(str(sources))
    try:
        run_long(platform, "making a minimal root with mmdebstrap", command)
        podman("import", "--quiet", str(archive), base)
    finally:
        archive.unlink(missing_ok=True)
    return base


def _apt_files(suite: str) -> tuple[tuple[str, str], ...]:
    """Return the apt configuration by which a host reaches what this machine's apt reaches."""
    mirrors = machine.debian_mirrors()
    if "debian" not in mirrors:
        return ()
    wanted = [(mirrors["debian"], f"{suite} {suite}-updates")]
    if "security" in mirrors:
        wanted.append((mirrors["security"], f"{suite}-security"))
    sources = "\n".join(
        f"Types: deb\nURIs: {url}\nSuites: {suites}\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        for url, suites in wanted
    )
    files = [("apt/sources", sources), ("apt/settings", machine.apt_settings())]
    if any(url.startswith("https:") for url, _ in wanted):
        # The image must not trust the machine's own authorities; its apt has to.
        files[1] = (
            "apt/settings",
            files[1][1] + 'Acquire::https::CaInfo "/etc/apt/testbed-ca.pem";\n',
        )
        files.append(("apt/ca.pem", machine.ca_bundle()))
    return tuple(files)


def _fetch_node_modules(directory: Path, base: str) -> None:
    """Put the mail catcher's locked packages into `directory`.

    With the machine's npm where there is one; else with Debian's in a container that is thrown
    away, because npm brings along ten times what the mail catcher needs.
    """
    install = ["npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
    if shutil.which("npm"):
        run_long(MAIL, "fetching its packages with npm", install, directory)
    else:
        _npm_in_a_container(directory, base, install)

    def leave_out(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith((".map", ".ts", ".mts", ".cts")) else entry

    # One archive without what only developers read: thousands of small files are slow to copy.
    with tarfile.open(directory / "node_modules.tar", "w") as archive:
        archive.add(directory / "node_modules", "node_modules", filter=leave_out)


def _npm_in_a_container(directory: Path, base: str, install: list[str]) -> None:
    authorities = "".join(path.read_text() for path in machine.extra_ca_certificates())
    (directory / "authorities.pem").write_text(authorities)
    script = (
        "apt-get -qq update && apt-get -qq install --no-install-recommends --yes npm >/dev/null && "
        f"cd /build && NODE_EXTRA_CA_CERTS=/build/authorities.pem {' '.join(install)}"
    )
    run_long(
        MAIL,
        "fetching its packages with npm in a container",
        [
            *machine.podman_command(), "run", "--rm", "--network=host", "--user=0",
            *machine.limits(),
            "--volume", f"{directory}:/build:Z", base, "sh", "-c", script,
        ],
    )  # fmt: skip
