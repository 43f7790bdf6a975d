"""Write the Grafana dashboards in docs/dashboards: python docs/generate_dashboards.py."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "dashboards"
# Grafana replaces $app with the selected application.
APP = '{app="$app"}'
MEMORY = f"node_memory_MemAvailable_bytes{APP} / node_memory_MemTotal_bytes{APP}"
# Per dashboard: its title, and panels with a title, a unit of Grafana, and queries with their legends.
DASHBOARDS = {
    "emails": (
        "Emails",
        [
            ("Accepted per second", "ops", [('max(rate(mailroom_accepted_total{app="$app"}[5m]))', "accepted")]),
            (
                "Attempts per second",
                "ops",
                [('max by (outcome) (rate(mailroom_attempts_total{app="$app"}[5m]))', "{{outcome}}")],
            ),
            ("Deliveries that are not finished", "short", [('max by (state) (mailroom_deliveries{app="$app"})', "{{state}}")]),
            (
                "Age of the oldest email",
                "s",
                [
                    ('max(mailroom_oldest_due_seconds{app="$app"})', "due, not published"),
                    ('max(mailroom_queue_age_seconds{app="$app"})', "waits for a worker"),
                ],
            ),
            (
                "Duration of an attempt",
                "s",
                [
                    ('histogram_quantile(0.5, max by (le) (rate(mailroom_send_seconds_bucket{app="$app"}[5m])))', "half of them"),
                    ('histogram_quantile(0.95, max by (le) (rate(mailroom_send_seconds_bucket{app="$app"}[5m])))', "95 %"),
                ],
            ),
            ("Failed and held deliveries", "short", [('max(mailroom_dead{app="$app"})', "need an operator")]),
            (
                "Publications",
                "short",
                [
                    ('max(increase(mailroom_publish_failures_total{app="$app"}[5m]))', "failed"),
                    ('max(increase(mailroom_republished_total{app="$app"}[5m]))', "repeated"),
                ],
            ),
        ],
    ),
    "workers": (
        "Workers",
        [
            ("Workers online", "short", [('flower_worker_online{app="$app"}', "{{worker}}")]),
            (
                "Tasks per second",
                "ops",
                [('sum by (task, type) (rate(flower_events_total{app="$app"}[5m]))', "{{task}} {{type}}")],
            ),
            (
                "Mean duration of a task",
                "s",
                [
                    (
                        'sum by (task) (rate(flower_task_runtime_seconds_sum{app="$app"}[5m])) '
                        '/ sum by (task) (rate(flower_task_runtime_seconds_count{app="$app"}[5m]))',
                        "{{task}}",
                    )
                ],
            ),
            (
                "Services",
                "short",
                [('node_systemd_unit_state{app="$app", state="active"}', "{{instance}} {{name}}")],
            ),
            ("Restarts", "short", [('increase(node_systemd_service_restart_total{app="$app"}[15m])', "{{instance}} {{name}}")]),
        ],
    ),
    "rabbitmq": (
        "RabbitMQ",
        [
            ("Nodes", "short", [('up{app="$app", job="rabbitmq"}', "{{instance}}")]),
            ("Messages that wait", "short", [(f"sum by (queue) (rabbitmq_detailed_queue_messages_ready{APP})", "{{queue}}")]),
            (
                "Unacknowledged messages",
                "short",
                [(f"sum by (queue) (rabbitmq_detailed_queue_messages_unacked{APP})", "{{queue}}")],
            ),
            ("Consumers", "short", [(f"sum by (queue) (rabbitmq_detailed_queue_consumers{APP})", "{{queue}}")]),
            (
                "Members of queues",
                "short",
                [('count by (queue) (rabbitmq_detailed_raft_term_total{app="$app", queue!=""})', "{{queue}}")],
            ),
            (
                "Messages per second",
                "ops",
                [
                    ('sum by (instance) (rate(rabbitmq_global_messages_received_total{app="$app"}[5m]))', "{{instance}} published"),
                    (
                        'sum by (instance) (rate(rabbitmq_global_messages_delivered_total{app="$app"}[5m]))',
                        "{{instance}} delivered",
                    ),
                ],
            ),
            ("Connections", "short", [('rabbitmq_connections{app="$app"}', "{{instance}}")]),
            (
                "Memory",
                "bytes",
                [
                    ('rabbitmq_process_resident_memory_bytes{app="$app"}', "{{instance}}"),
                    ('rabbitmq_resident_memory_limit_bytes{app="$app"}', "{{instance}} limit"),
                ],
            ),
            (
                "Free disk space",
                "bytes",
                [
                    ('rabbitmq_disk_space_available_bytes{app="$app"}', "{{instance}}"),
                    ('rabbitmq_disk_space_available_limit_bytes{app="$app"}', "{{instance}} limit"),
                ],
            ),
            ("File descriptors", "short", [('rabbitmq_process_open_fds{app="$app"}', "{{instance}}")]),
        ],
    ),
    "postgresql": (
        "PostgreSQL",
        [
            ("Server", "short", [('pg_up{app="$app"}', "{{instance}}")]),
            ("Connections", "short", [('sum by (datname, state) (pg_stat_activity_count{app="$app"})', "{{datname}} {{state}}")]),
            (
                "Transactions per second",
                "ops",
                [
                    ('sum by (datname) (rate(pg_stat_database_xact_commit{app="$app"}[5m]))', "{{datname}} committed"),
                    ('sum by (datname) (rate(pg_stat_database_xact_rollback{app="$app"}[5m]))', "{{datname}} rolled back"),
                ],
            ),
            ("Size", "bytes", [('pg_database_size_bytes{app="$app"}', "{{datname}}")]),
            (
                "Longest transaction",
                "s",
                [('max by (datname, state) (pg_stat_activity_max_tx_duration{app="$app"})', "{{datname}} {{state}}")],
            ),
        ],
    ),
    "hosts": (
        "Hosts",
        [
            ("Hosts", "short", [('up{app="$app", job="node"}', "{{instance}}")]),
            (
                "Processor",
                "percentunit",
                [('1 - avg by (instance) (rate(node_cpu_seconds_total{app="$app", mode="idle"}[5m]))', "{{instance}}")],
            ),
            ("Available memory", "percentunit", [(MEMORY, "{{instance}}")]),
            (
                "Free disk space",
                "percentunit",
                [
                    (
                        'min by (instance, device) (node_filesystem_avail_bytes{app="$app", fstype!="tmpfs"} '
                        '/ node_filesystem_size_bytes{app="$app"})',
                        "{{instance}} {{device}}",
                    )
                ],
            ),
            (
                "Network",
                "Bps",
                [
                    (
                        'sum by (instance) (rate(node_network_receive_bytes_total{app="$app", device!="lo"}[5m]))',
                        "{{instance}} received",
                    ),
                    (
                        'sum by (instance) (rate(node_network_transmit_bytes_total{app="$app", device!="lo"}[5m]))',
                        "{{instance}} sent",
                    ),
                ],
            ),
            ("Clock offset", "s", [('node_timex_offset_seconds{app="$app"}', "{{instance}}")]),
            ("Uptime", "s", [('time() - node_boot_time_seconds{app="$app"}', "{{instance}}")]),
        ],
    ),
}


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict:
    """Return a panel. There are two panels per row."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "gridPos": {"h": 8, "w": 12, "x": number % 2 * 12, "y": number // 2 * 8},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


def dashboard(name: str) -> str:
    """Return the JSON of a dashboard."""
    title, panels = DASHBOARDS[name]
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    app = {
        "name": "app",
        "label": "Application",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": "label_values(up, app)",
        "refresh": 1,
    }
    content = {
        "title": title,
        "uid": f"django-celery-{name}",
        "tags": ["django-celery"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, app]},
        "panels": [panel(number, *each) for number, each in enumerate(panels)],
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(dashboard(each))
