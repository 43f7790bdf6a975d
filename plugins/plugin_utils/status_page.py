"""The status of an environment as one HTML page without external files."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from ansible_collections.django_celery.stack.plugins.plugin_utils.status_report import (
    HOST_HEADER,
    QUEUE_HEADER,
    REPLICATION_HEADER,
    Finding,
    Report,
    application_rows,
    backup_rows,
    certificate_rows,
    headline,
    host_rows,
    queue_rows,
    replication_rows,
    state,
    worst,
)

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2330; --soft: #5d6878; --line: #dde2e9;
  --ok: #16835a; --warning: #a86200; --fault: #c62f3b; --edge: #94a0b0; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b212a; --text: #e6eaf0; --soft: #98a4b3; --line: #303946;
  --ok: #4cc495; --warning: #eeb04e; --fault: #ff7f87; --edge: #66738a; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 74rem; margin: auto; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1rem; margin-bottom: 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h1 small { color: var(--soft); font-weight: 400; }
h2 { font-size: 1.02rem; margin: 0 0 .7rem; }
time { color: var(--soft); margin-left: auto; }
.badge { padding: .15rem .75rem; border-radius: 1rem; font-weight: 600; color: var(--card); background: var(--ok); }
.badge.warnings { background: var(--warning); } .badge.faults { background: var(--fault); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: 1rem 1.2rem; margin-bottom: 1rem;
  overflow-x: auto; }
ul { list-style: none; margin: 0; padding: 0; }
li { padding: .25rem 0 .25rem .8rem; border-left: 3px solid var(--warning); margin-bottom: .4rem; overflow-wrap: anywhere; }
li.fault { border-color: var(--fault); } li b { margin-right: .4rem; }
table { border-collapse: collapse; width: 100%; } th { color: var(--soft); font-weight: 500; font-size: .87rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.ok { color: var(--ok); } td.warning { color: var(--warning); font-weight: 600; }
td.fault { color: var(--fault); font-weight: 600; }
svg { display: block; width: 100%; min-width: 46rem; height: auto; font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text { fill: var(--text); } svg .soft { fill: var(--soft); font-size: 12px; }
svg .label { paint-order: stroke; stroke: var(--card); stroke-width: 6px; }
svg .box { fill: var(--page); stroke: var(--line); } svg .box.outside { stroke-dasharray: 4 4; fill: none; }
svg .edge { fill: none; stroke: var(--edge); stroke-width: 1.5; } svg marker path { fill: var(--edge); }
svg circle.ok { fill: var(--ok); } svg circle.warning { fill: var(--warning); } svg circle.fault { fill: var(--fault); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1rem; align-items: start; }
"""

# Geometry of the picture
WIDTH, ROW, TITLE, GAP = 168, 24, 34, 26
COLUMNS = [8, 272, 536, 800]
NUMBERS = {*QUEUE_HEADER[2:6], "free disk"}


class Box(NamedTuple):
    title: str
    x: int
    y: int
    hosts: list[str]
    note: str = ""

    @property
    def height(self) -> int:
        return TITLE + ROW * max(len(self.hosts) + bool(self.note), 1)

    def port(self, ends: list[str], number: int) -> int:
        """Return the vertical position at which edge `number` ends at this box. `ends` contains the box of each edge."""
        here = [index for index, box in enumerate(ends) if box == ends[number]]
        return self.y + self.height * (here.index(number) + 1) // (len(here) + 1)


def boxes(report: Report) -> dict[str, Box]:
    """Return a box per group, in four columns: clients, proxy and web, then database and broker, then workers and Flower."""
    groups = {
        group: [host["name"] for host in report["hosts"] if group in host["groups"]]
        for group in ("proxy", "web", "database", "broker", "workers", "flower")
    }
    messages = sum(queue.get("messages", 0) for queue in report["broker"].get("queues", []))
    notes = {"broker": f"{messages:,} messages" if report["broker"] else "no answer"}
    titles = {
        "proxy": "Proxy",
        "web": "Web and relay",
        "database": "Database",
        "broker": "Broker",
        "workers": "Workers",
        "flower": "Flower",
    }
    columns = [["proxy"], ["web"], ["database", "broker"], ["workers", "flower"]]
    found: dict[str, Box] = {}
    for x, column in zip(COLUMNS, columns, strict=True):
        y = 8
        for group in column:
            if groups[group] or group == "database":
                box = Box(titles[group], x, y, groups[group], notes.get(group, "" if groups[group] else "another server"))
                found[group] = box
                y += box.height + GAP
    return found


EDGES = [
    ("proxy", "web", "HTTP"),
    ("web", "database", "rows"),
    ("web", "broker", "relay"),
    ("database", "workers", "rows"),
    ("broker", "workers", "tasks"),
    ("broker", "flower", "events"),
]


def topology(report: Report, found: list[Finding]) -> str:
    """Return the groups, their hosts and the connections between them as SVG."""
    drawn = boxes(report)
    levels = {host["name"]: worst(host, found) for host in report["hosts"]}
    height = max(box.y + box.height for box in drawn.values()) + 8
    parts = [
        f'<svg viewBox="0 0 {COLUMNS[-1] + WIDTH + 8} {height}" role="img" aria-label="Hosts and connections">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    edges = [each for each in EDGES if each[0] in drawn and each[1] in drawn]
    lines = []
    for number, (source, target, label) in enumerate(edges):
        # The edges at one side of a box are distributed over its height.
        start = drawn[source].port([each[0] for each in edges], number)
        end = drawn[target].port([each[1] for each in edges], number)
        lines.append(edge((drawn[source].x + WIDTH, start), (drawn[target].x - 2, end), label))
    # Labels come after the lines, so they are drawn above them.
    parts += [line for line, _ in lines] + [text for _, text in lines]
    parts += [picture(box, levels) for box in drawn.values()]
    return "\n".join([*parts, "</svg>"])


def edge(start: tuple[int, int], end: tuple[int, int], label: str) -> tuple[str, str]:
    """Return the line of an edge and its label. The label is near the end of the line, where no other edge is."""
    centre = (start[0] + end[0]) // 2
    path = f"M{start[0]} {start[1]}C{centre} {start[1]} {centre} {end[1]} {end[0]} {end[1]}"
    return (
        f'<path class="edge" d="{path}" marker-end="url(#arrow)"/>',
        f'<text class="soft label" x="{end[0] - 12}" y="{end[1] - 7}" text-anchor="end">{escape(label)}</text>',
    )


def picture(box: Box, levels: dict[str, str]) -> str:
    outside = "" if box.hosts else " outside"
    parts = [
        f'<rect class="box{outside}" x="{box.x}" y="{box.y}" width="{WIDTH}" height="{box.height}" rx="9"/>',
        f'<text x="{box.x + 12}" y="{box.y + 21}" font-weight="600">{escape(box.title)}</text>',
    ]
    for number, host in enumerate(box.hosts):
        y = box.y + TITLE + ROW * number + 8
        short = host if len(host) <= 20 else host[:19] + "…"
        parts.append(
            f'<circle class="{levels[host]}" cx="{box.x + 18}" cy="{y - 4}" r="5"><title>{levels[host]}</title></circle>'
            f'<text x="{box.x + 31}" y="{y}">{escape(short)}<title>{escape(host)}</title></text>'
        )
    if box.note:
        parts.append(
            f'<text class="soft" x="{box.x + 12}" y="{box.y + TITLE + ROW * len(box.hosts) + 8}">{escape(box.note)}</text>'
        )
    return "".join(parts)


def section(title: str, header: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""

    def cell(name: str, text: str, tag: str) -> str:
        css = "number" if name in NUMBERS else text if name == "state" and tag == "td" else ""
        return f'<{tag} class="{escape(css)}">{escape(text)}</{tag}>' if css else f"<{tag}>{escape(text)}</{tag}>"

    head = "".join(cell(name, name, "th") for name in header)
    body = "\n".join(
        f"<tr>{''.join(cell(name, text, 'td') for name, text in zip(header, line, strict=True))}</tr>" for line in lines
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f"<section><h2>{escape(title)}</h2><table>{top}<tbody>{body}</tbody></table></section>"


def pair(left: str, right: str) -> str:
    return f'<div class="pair">{left}{right}</div>' if left or right else ""


def unit_rows(report: Report) -> list[list[str]]:
    return [
        [host["name"], unit["name"], "ok" if unit["state"] == "active" else "fault", unit["state"], str(unit["restarts"])]
        for host in report["hosts"]
        for unit in (host["status"] or {}).get("units", [])
    ]


def worker_rows(report: Report) -> list[list[str]]:
    return [
        [host["name"], worker["name"], *(("ok", "answers") if worker["answers"] else ("fault", "no answer"))]
        for host in report["hosts"]
        for worker in (host["status"] or {}).get("workers", [])
    ]


def drift_rows(drift: dict[str, list[str]] | None) -> list[list[str]]:
    return [[host, str(len(tasks)), ", ".join(tasks)] for host, tasks in (drift or {}).items()]


def page(report: Report, found: list[Finding]) -> str:
    title = f"{report['app']} in {report['environment']}"
    listed = "".join(
        f'<li class="{finding.level}">{f"<b>{escape(finding.host)}</b>" if finding.host else ""}{escape(finding.text)}</li>'
        for finding in found
    )
    return "\n".join(
        part
        for part in [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: {headline(found)}</title>',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>',
            f"<header><h1>{escape(report['app'])} <small>{escape(report['environment'])}</small></h1>"
            f'<span class="badge {state(found)}">{headline(found)}</span><time>{escape(report["time"])}</time></header>',
            f"<section><h2>Findings</h2><ul>{listed}</ul></section>" if found else "",
            f"<section><h2>Topology</h2>{topology(report, found)}</section>",
            section("Hosts", HOST_HEADER, host_rows(report, found)),
            section("Queues", QUEUE_HEADER, queue_rows(report["broker"])),
            pair(
                section("Application, last 24 hours", ["", ""], application_rows(report["application"])),
                section("Workers", ["host", "worker", "state", "ping"], worker_rows(report)),
            ),
            section("Replication", REPLICATION_HEADER, replication_rows(report["hosts"])),
            pair(
                section("Certificates", ["host", "file", "left"], certificate_rows(report["hosts"])),
                section("Backups", ["host", "backup", "age"], backup_rows(report["backups"])),
            ),
            section("Services", ["host", "unit", "state", "systemd", "restarts"], unit_rows(report)),
            section("Drift", ["host", "changes", "tasks"], drift_rows(report["drift"])),
            "</main></body></html>\n",
        ]
        if part
    )
