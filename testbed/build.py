"""The images of the hosts and of the mail catcher, built once per machine.

An image's tag is the hash of all its inputs. A changed input therefore creates a new image, and clones with the same inputs share
images.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from testbed import machine
from testbed.inventory import MAIL, PLATFORMS, Host
from testbed.machine import TestbedError, podman
from testbed.progress import run_long, say

# Increase this number if a change of this file builds different images from the same inputs.
RECIPE = 2

# Configuration files of apt on a host, relative to its root.
SOURCES = "etc/apt/sources.list.d/debian.sources"
SETTINGS = "etc/apt/apt.conf.d/90testbed"
AUTHORITIES = "etc/apt/testbed-ca.pem"

# A stand-in's variables for its inventory, and the files that these variables name, are in this directory of the host.
STAND_IN_FILES = "/etc/testbed"

NPM = ("npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund")

DEBIAN_SUITES = {"debian12": "bookworm", "debian13": "trixie", "debian-testing": "testing"}


@dataclass(frozen=True)
class Image:
    """The inputs of an image: a folder of `images/`, additional files, and the base image."""

    platform: str
    published: str | None  # the base image; None: a root file system that mmdebstrap makes
    added: tuple[tuple[str, str], ...] = ()  # (path in the build directory, text)

    @property
    def folder(self) -> Path:
        """The folder with the image's files."""
        return PLATFORMS / self.platform

    @property
    def root(self) -> str:
        """The platform whose root file system is the base: the image's own platform, unless its folder names another one."""
        named = self.folder / "root"
        return named.read_text().strip() if named.exists() else self.platform

    @property
    def stands_in(self) -> bool:
        """Return whether the image imitates its platform on another platform's root file system."""
        return not self.published and (self.folder / "stand-in").is_dir()

    @property
    def packages(self) -> list[str]:
        """The packages of the root file system."""
        return (PLATFORMS / self.root / "packages").read_text().split()

    @property
    def base(self) -> str:
        """The reference of the base image."""
        if self.published:
            return self.published
        inputs = json.dumps([RECIPE, self.root, self.packages, self.added])
        return _reference(f"{self.root}-base", hashlib.sha256(inputs.encode()))

    @property
    def reference(self) -> str:
        """The local name of the image; its tag is the hash of all inputs."""
        digest = hashlib.sha256(json.dumps([RECIPE, self.base, self.added]).encode())
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                digest.update(f"\0{path.relative_to(self.folder)}\0".encode() + path.read_bytes())
        return _reference(self.platform, digest)


def _reference(name: str, digest: hashlib._Hash) -> str:
    return f"localhost/testbed/{name}:{digest.hexdigest()[:12]}"


def image_of(host: Host) -> Image:
    """Return the image of `host`, even if it is not built yet."""
    image = Image(host.platform, host.base_image)
    # The machine's mirrors are for Debian, so a published image of another distribution does not get them.
    suite = None if host.base_image and (image.folder / "stand-in").is_dir() else DEBIAN_SUITES.get(image.root)
    return replace(image, added=_apt_files(suite) if suite else ())


def ensure(images: set[Image]) -> None:
    """Build the missing images in `images`, and their missing bases. Builds run in parallel.

    Raise TestbedError when a step of a build fails.
    """
    with ThreadPoolExecutor() as pool:
        list(pool.map(_ensure, images))


def remove_unused() -> None:
    """Remove the images of all clones that no container uses."""
    names = ("--filter", "reference=localhost/testbed/*", "--format", "{{.Repository}}:{{.Tag}}")
    for name in podman("images", *names).stdout.split():
        if podman("rmi", name, check=False).returncode == 0:
            say(name, "removed")


def _ensure(image: Image) -> None:
    if _exists(image.reference):
        return
    name = image.platform
    with machine.lock(f"image-{name}", f"waiting for another process to build the {name} image"):
        if _exists(image.reference):
            return
        with machine.scratch_directory() as directory:
            _build(image, directory)
    say(name, f"image {image.reference} is ready")


def _exists(reference: str) -> bool:
    return podman("image", "exists", reference, check=False).returncode == 0


def _build(image: Image, directory: Path) -> None:
    shutil.copytree(image.folder, directory, dirs_exist_ok=True)
    (directory / "added").mkdir()
    for name, text in image.added:
        path = directory / "added" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if image.platform == MAIL and shutil.which("npm"):
        run_long(MAIL, "downloading packages with npm", NPM, directory)
    if not image.published:
        _ensure_root(image)
    if image.platform == MAIL:
        if not shutil.which("npm"):
            _run_npm_in_a_container(directory, image.base)
        _pack_node_modules(directory)
    run_long(
        image.platform,
        f"building the image on {image.base}",
        [
            *machine.podman_command(), "build", *machine.build_options(), "--layers=false",
            "--build-arg", f"BASE={image.base}", "--tag", image.reference,
            "--file", str(directory / "Containerfile"), str(directory),
        ],
    )  # fmt: skip


def _ensure_root(image: Image) -> None:
    """Create the root file system of `image` with mmdebstrap, unless it exists."""
    root = image.root
    if root not in DEBIAN_SUITES:
        raise TestbedError(f"{root}: set testbed_image; the testbed can't make a root file system of this platform")
    with machine.lock(f"root-{root}", f"waiting for another process to make the root file system of {root}"):
        if _exists(image.base):
            return
        if not shutil.which("mmdebstrap"):
            raise TestbedError("mmdebstrap not found: run testbed/install, or set testbed_image to a published image")
        with machine.scratch_directory() as directory:
            archive = directory / "root.tar"
            command = _mmdebstrap(image, directory, archive)
            run_long(root, "making a root file system with mmdebstrap", command)
            podman("import", "--quiet", str(archive), image.base)


def _mmdebstrap(image: Image, directory: Path, archive: Path) -> list[str]:
    """Write the apt sources into `directory`; return the command that makes `archive`."""
    added = dict(image.added)
    settings = ["Acquire::Retries 3;", *added.get(SETTINGS, "").splitlines()]
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(image.packages)}"]
    # mmdebstrap runs on the machine, so it already trusts the machine's certificate authorities.
    command += [f"--aptopt={setting}" for setting in settings if "CaInfo" not in setting]
    command += [DEBIAN_SUITES[image.root], str(archive)]
    if SOURCES in added:
        sources = directory / "testbed.sources"
        sources.write_text(added[SOURCES])
        command.append(str(sources))
    return command


def _apt_files(suite: str) -> tuple[tuple[str, str], ...]:
    """Return the apt configuration with which a host uses this machine's mirrors."""
    mirrors = machine.debian_mirrors()
    if "debian" not in mirrors:
        return ()
    wanted = [(mirrors["debian"], f"{suite} {suite}-updates")]
    if "security" in mirrors:
        wanted.append((mirrors["security"], f"{suite}-security"))
    sources = "\n".join(
        f"Types: deb\nURIs: {url}\nSuites: {suites}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        for url, suites in wanted
    )
    settings = machine.apt_settings()
    files = [(SOURCES, sources)]
    if any(url.startswith("https:") for url, _ in wanted):
        # Only apt may trust the machine's certificate authorities, since the roles must add them to the host.
        settings += f'Acquire::https::CaInfo "/{AUTHORITIES}";\n'
        files.append((AUTHORITIES, machine.ca_bundle()))
    return (*files, (SETTINGS, settings))


def _run_npm_in_a_container(directory: Path, base: str) -> None:
    """Download the mail catcher's packages when the machine has no npm.

    npm runs in a temporary container, because Debian's npm is ten times as large as the mail catcher's packages.
    """
    authorities = "".join(path.read_text() for path in machine.extra_ca_certificates())
    (directory / "authorities.pem").write_text(authorities)
    script = (
        "cp -r /build/added/. / && apt-get -qq update && "
        "DEBIAN_FRONTEND=noninteractive "
        "apt-get -qq install --no-install-recommends --yes npm >/dev/null && "
        f"cd /build && NODE_EXTRA_CA_CERTS=/build/authorities.pem {' '.join(NPM)}"
    )
    run_long(
        MAIL,
        "downloading packages with npm in a container",
        [
            *machine.podman_command(), "run", "--rm", "--network=host", "--user=0",
            *machine.limits(), "--volume", f"{directory}:/build:Z", base, "sh", "-c", script,
        ],
    )  # fmt: skip


def _pack_node_modules(directory: Path) -> None:
    """Pack the packages into one archive, because thousands of small files are slow to copy.

    The archive excludes source maps and type declarations, which make up half of the size.
    """

    def leave_out(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith((".map", ".ts", ".mts", ".cts")) else entry

    with tarfile.open(directory / "node_modules.tar", "w") as archive:
        archive.add(directory / "node_modules", "node_modules", filter=leave_out)
