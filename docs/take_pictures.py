"""Takes the pictures of the README in docs/pictures: `make pictures`.

Reads the addresses and logins of a running sandbox from standard input, as `make -s sandbox-info` prints them. Takes the page of
the application and status/sandbox/status.html, and draws the memory of the sandbox's services.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from xml.sax.saxutils import escape

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs/pictures"
SUBJECTS = ["Your order 1007 has been shipped", "Reset your password", "Invoice for November", "Welcome", "Your weekly report"]
# Runs on the sandbox: prints the proportional set size of each service's processes in megabytes.
MEMORY = """
import collections, glob, json, os
sizes = collections.Counter()
for folder in glob.glob("/proc/[0-9]*"):
    try:
        units = [part for part in open(folder + "/cgroup").read().split("/") if part.strip().endswith(".service")]
        lines = open(folder + "/smaps_rollup").read().splitlines()
    except OSError:
        continue  # The process has ended.
    if units:
        sizes[units[-1].strip()] += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
print(json.dumps(sizes))
"""
PREFIXES = ("mailroom", "rabbitmq", "postgresql")


def send_emails(web: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {web['api_key']}", "Content-Type": "application/json"}
    for number, subject in enumerate(SUBJECTS, 1):
        body = {"subject": subject, "text": "It works.", "to": [f"customer-{number}@example.com"]}
        request = urllib.request.Request(f"{web['url']}api/emails", json.dumps(body).encode(), headers)  # noqa: S310 - the sandbox
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310 - the sandbox


def take_page(page: Page, web: dict[str, str]) -> None:
    page.goto(web["url"])
    page.get_by_label("Username").fill(web["user"])
    page.get_by_label("Password").fill(web["password"])
    page.get_by_role("button", name="Log in").click()
    until = time.monotonic() + 60
    while page.locator(".emails > li").filter(has_text="sent").count() < len(SUBJECTS):
        if time.monotonic() > until:
            sys.exit("The emails were not sent within a minute. Is the sandbox healthy? make status ENV=sandbox")
        time.sleep(1)
        page.reload()
    page.screenshot(path=PICTURES / "page.png")


def take_status(page: Page) -> None:
    page.goto((ROOT / "status/sandbox/status.html").as_uri())
    page.screenshot(path=PICTURES / "status.png")


def memory() -> dict[str, float]:
    """Returns the megabytes of each service of the application, the broker and the database."""
    command = [ROOT / ".venv/bin/python", "-m", "testbed", "exec", "--inventory", "inventories/sandbox", "sandbox"]
    done = subprocess.run([*command, "--", "python3", "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: size for name, size in json.loads(done.stdout).items() if name.startswith(PREFIXES)}


def plot(title: str, values: dict[str, float]) -> str:
    """Returns an SVG with one bar per value, the longest first."""
    scale = 380 / max(values.values())
    lines = []
    for number, (name, value) in enumerate(sorted(values.items(), key=lambda each: -each[1])):
        y = 44 + 30 * number
        lines += [
            f'  <text x="300" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'  <rect x="310" y="{y}" width="{value * scale:.0f}" height="20" fill="#3949ab"/>',
            f'  <text x="{318 + value * scale:.0f}" y="{y + 15}">{value:.0f}</text>',
        ]
    height = 54 + 30 * len(values)
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height}" font-family="sans-serif" font-size="14">'
    background = f'  <rect width="780" height="{height}" fill="#fff"/>'
    return "\n".join([begin, background, f'  <text x="20" y="26" font-size="16">{escape(title)}</text>', *lines, "</svg>\n"])


def main() -> None:
    web = json.load(sys.stdin)["web"]
    send_emails(web)
    with sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("chromium-browser")
        # Chromium's sandbox does not work for root.
        browser = playwright.chromium.launch(executable_path=executable, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        take_page(page, web)
        take_status(page)
        browser.close()
    (PICTURES / "memory.svg").write_text(plot("Memory of each service in the sandbox, in megabytes", memory()))


if __name__ == "__main__":
    main()
