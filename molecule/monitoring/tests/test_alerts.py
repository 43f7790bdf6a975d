"""Tests the alert rules with promtool on the monitoring host: each alert fires on its series, and on no others."""

from __future__ import annotations

import base64

import pytest
import yaml

RULES = "/etc/prometheus/rules/*.yml"
HOST = 'app="shop",instance="h1"'
QUEUE = f'{HOST},vhost="shop",queue="mail.v1"'
MINUTES = 600
FLOWER = 'app="shop",instance="h1",task="t"'


def growing(start, step):
    return f"{start}{step:+}x{MINUTES}"


def steady(value):
    return growing(value, 0)


# A healthy environment with a cluster of three brokers.
HEALTHY = {
    **{f'up{{app="shop",instance="h1",job="{job}"}}': steady(1) for job in ("node", "app", "flower", "postgresql", "prometheus")},
    **{f'up{{app="shop",instance="mq{number}",job="rabbitmq"}}': steady(1) for number in (1, 2, 3)},
    # Promtool's clock starts at 0, so the host has been up for a day.
    f"node_boot_time_seconds{{{HOST}}}": steady(-86400),
    f'node_filesystem_avail_bytes{{{HOST},device="d",fstype="ext4",mountpoint="/"}}': steady(50e9),
    f'node_filesystem_size_bytes{{{HOST},device="d",fstype="ext4",mountpoint="/"}}': steady(100e9),
    f'node_filesystem_files_free{{{HOST},device="d",fstype="ext4",mountpoint="/"}}': steady(900),
    f'node_filesystem_files{{{HOST},device="d",fstype="ext4",mountpoint="/"}}': steady(1000),
    f"node_memory_MemAvailable_bytes{{{HOST}}}": steady(4e9),
    f"node_memory_MemTotal_bytes{{{HOST}}}": steady(8e9),
    f"node_vmstat_oom_kill{{{HOST}}}": steady(3),
    f"node_timex_offset_seconds{{{HOST}}}": steady(0.001),
    f"node_timex_sync_status{{{HOST}}}": steady(1),
    # The last backup was made at minute 0.
    f'backup_last_success_timestamp_seconds{{{HOST},kind="postgresql"}}': steady(0),
    f'node_systemd_unit_state{{{HOST},name="shop-web.service",state="active"}}': steady(1),
    f'node_systemd_unit_state{{{HOST},name="shop-web.service",state="failed"}}': steady(0),
    f'node_systemd_service_restart_total{{{HOST},name="shop-web.service"}}': steady(2),
    f'flower_worker_online{{{HOST},worker="mail@h1"}}': steady(1),
    f'flower_events_total{{{FLOWER},type="task-succeeded",worker="mail@h1"}}': growing(0, 10),
    f'flower_events_total{{{FLOWER},type="task-failed",worker="mail@h1"}}': steady(5),
    f"rabbitmq_alarms_memory_used_watermark{{{HOST}}}": steady(0),
    f"rabbitmq_alarms_free_disk_space_watermark{{{HOST}}}": steady(0),
    f"rabbitmq_process_open_fds{{{HOST}}}": steady(100),
    f"rabbitmq_process_max_fds{{{HOST}}}": steady(65536),
    f"rabbitmq_disk_space_available_bytes{{{HOST}}}": steady(50e9),
    f"rabbitmq_disk_space_available_limit_bytes{{{HOST}}}": steady(2e9),
    f"rabbitmq_unreachable_cluster_peers_count{{{HOST}}}": steady(0),
    **{
        f'rabbitmq_identity_info{{app="shop",instance="mq{number}",rabbitmq_cluster_permanent_id="id1"}}': steady(1)
        for number in (1, 2, 3)
    },
    **{
        f'rabbitmq_build_info{{app="shop",instance="mq{number}",rabbitmq_version="4.0.5",erlang_version="27.3"}}': steady(1)
        for number in (1, 2, 3)
    },
    f"rabbitmq_connections_opened_total{{{HOST}}}": growing(0, 30),
    f'rabbitmq_global_messages_unroutable_returned_total{{{HOST},protocol="amqp091"}}': steady(7),
    f"rabbitmq_detailed_queue_messages_ready{{{QUEUE}}}": steady(5000),
    f"rabbitmq_detailed_queue_messages_unacked{{{QUEUE}}}": steady(5000),
    f"rabbitmq_detailed_queue_messages{{{QUEUE}}}": steady(10000),
    f"rabbitmq_detailed_queue_consumers{{{QUEUE}}}": steady(4),
    # Queues without consumers by design.
    f'rabbitmq_detailed_queue_messages{{{HOST},vhost="shop",queue="celery_delayed_9"}}': steady(3),
    f'rabbitmq_detailed_queue_consumers{{{HOST},vhost="shop",queue="celery_delayed_9"}}': steady(0),
    f'rabbitmq_detailed_queue_messages{{{HOST},vhost="shop",queue="mail.dead.v1"}}': steady(0),
    f'rabbitmq_detailed_queue_consumers{{{HOST},vhost="shop",queue="mail.dead.v1"}}': steady(0),
    **{
        f'rabbitmq_detailed_raft_term_total{{app="shop",instance="mq{number}",vhost="shop",queue="mail.v1"}}': steady(1)
        for number in (1, 2, 3)
    },
    f"pg_up{{{HOST}}}": steady(1),
    f'pg_stat_activity_count{{{HOST},datname="shop",state="idle"}}': steady(20),
    f"pg_settings_max_connections{{{HOST}}}": steady(100),
    f'pg_stat_activity_max_tx_duration{{{HOST},datname="shop",state="idle in transaction"}}': steady(1),
    f'pg_stat_activity_max_tx_duration{{{HOST},datname="shop",state="active"}}': steady(7200),
    f"mailroom_oldest_due_seconds{{{HOST}}}": steady(10),
    f"mailroom_queue_age_seconds{{{HOST}}}": steady(100),
    f"mailroom_dead{{{HOST}}}": steady(4),
    f'mailroom_attempts_total{{{HOST},outcome="sent"}}': growing(0, 10),
    f'mailroom_attempts_total{{{HOST},outcome="deferred"}}': growing(0, 4),
    f"mailroom_publish_failures_total{{{HOST}}}": steady(9),
    f"mailroom_republished_total{{{HOST}}}": steady(9),
}


def of(name, more=""):
    """The name of the only healthy series of a metric that contains a string."""
    (found,) = [series for series in HEALTHY if series.startswith(f"{name}{{") and more in series]
    return found


# Per alert: the minute at which it fires, and the series that differ from the healthy ones.
CASES = {
    "HostDown": (10, {of("up", '"node"'): "0x600"}),
    "HostRebooted": (300, {of("node_boot_time_seconds"): steady(295 * 60)}),
    "DiskAlmostFull": (300, {of("node_filesystem_avail_bytes"): steady(9e9)}),
    "DiskFullSoon": (400, {of("node_filesystem_avail_bytes"): growing(39e9, -5e7)}),
    "InodesAlmostUsed": (300, {of("node_filesystem_files_free"): steady(99)}),
    "MemoryLow": (300, {of("node_memory_MemAvailable_bytes"): steady(7e8)}),
    "OutOfMemory": (300, {of("node_vmstat_oom_kill"): "3x295 4x300"}),
    "ClockWrong": (300, {of("node_timex_offset_seconds"): steady(-0.2)}),
    "BackupOld": (300, {of("backup_last_success_timestamp_seconds"): steady(-22 * 3600)}),
    "ServiceDown": (
        300,
        {of("node_systemd_unit_state", "active"): steady(0), of("node_systemd_unit_state", "failed"): steady(1)},
    ),
    "ServiceRestarts": (300, {of("node_systemd_service_restart_total"): growing(0, 1)}),
    "WebDown": (300, {of("up", '"app"'): steady(0)}),
    "FlowerDown": (300, {of("up", '"flower"'): steady(0)}),
    "WorkerMissing": (300, {of("flower_worker_online"): steady(0)}),
    "TasksFail": (300, {of("flower_events_total", "failed"): growing(0, 2)}),
    "MonitoringDown": (300, {of("up", '"prometheus"'): steady(0)}),
    "RabbitMQNodeDown": (300, {of("up", "mq3"): steady(0)}),
    "RabbitMQMemoryAlarm": (300, {of("rabbitmq_alarms_memory_used_watermark"): steady(1)}),
    "RabbitMQDiskAlarm": (300, {of("rabbitmq_alarms_free_disk_space_watermark"): steady(1)}),
    "RabbitMQFileDescriptors": (300, {of("rabbitmq_process_open_fds"): steady(60000)}),
    "RabbitMQDiskFullSoon": (400, {of("rabbitmq_disk_space_available_bytes"): growing(19e9, -2e7)}),
    "RabbitMQLinksMissing": (300, {of("rabbitmq_unreachable_cluster_peers_count"): steady(1)}),
    "RabbitMQSeparateClusters": (
        300,
        {
            of("rabbitmq_identity_info", "mq3"): "stale",
            'rabbitmq_identity_info{app="shop",instance="mq3",rabbitmq_cluster_permanent_id="id2"}': steady(1),
        },
    ),
    "RabbitMQVersionsDiffer": (
        300,
        {
            of("rabbitmq_build_info", "mq3"): "stale",
            'rabbitmq_build_info{app="shop",instance="mq3",rabbitmq_version="4.0.5",erlang_version="26.2"}': steady(1),
        },
    ),
    "RabbitMQConnectionChurn": (300, {of("rabbitmq_connections_opened_total"): growing(0, 300)}),
    "RabbitMQUnroutableMessages": (300, {of("rabbitmq_global_messages_unroutable_returned_total"): "7x295 8x300"}),
    "RabbitMQQueueGrows": (300, {of("rabbitmq_detailed_queue_messages_ready"): growing(1000, 10)}),
    "RabbitMQUnackedGrows": (300, {of("rabbitmq_detailed_queue_messages_unacked"): growing(1000, 10)}),
    "RabbitMQQueueWithoutConsumers": (300, {of("rabbitmq_detailed_queue_consumers", "mail.v1"): steady(0)}),
    "RabbitMQQueueTooFewMembers": (300, {of("rabbitmq_detailed_raft_term_total", "mq3"): "stale"}),
    "PostgreSQLDown": (300, {of("pg_up"): steady(0)}),
    "PostgreSQLConnections": (300, {of("pg_stat_activity_count"): steady(90)}),
    "PostgreSQLIdleTransaction": (300, {of("pg_stat_activity_max_tx_duration", "idle"): steady(700)}),
    "RelayDown": (300, {of("mailroom_oldest_due_seconds"): steady(70)}),
    "EmailsWait": (300, {of("mailroom_queue_age_seconds"): steady(400)}),
    "EmailsFailed": (300, {of("mailroom_dead"): "4x290 6x300"}),
    "EmailsDeferred": (300, {of("mailroom_attempts_total", "deferred"): growing(0, 20)}),
    "PublishFailures": (300, {of("mailroom_publish_failures_total"): growing(0, 1)}),
    "EmailsRepublished": (300, {of("mailroom_republished_total"): "9x290 10x300"}),
    "MessagesDeadLettered": (300, {of("rabbitmq_detailed_queue_messages", "dead"): steady(1)}),
}
# An alert that fires only together with another alert.
TOGETHER = {
    "RabbitMQQueueWithoutQuorum": (
        300,
        {of("rabbitmq_detailed_raft_term_total", name): "stale" for name in ("mq2", "mq3")},
        ["RabbitMQQueueTooFewMembers"],
    ),
}
ALL = {"healthy": (500, {}, [])} | {name: (*case, []) for name, case in CASES.items()} | TOGETHER


def unit_test(name):
    minute, changed, others = ALL[name]
    firing = sorted([*([name] if name != "healthy" else []), *others])
    series = HEALTHY | changed
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing],
            }
        ],
    }


@pytest.fixture(scope="module")
def promtool(host):
    """Runs unit tests with the rules that the role wrote; returns testinfra's result."""

    def run(*names):
        content = yaml.safe_dump({"rule_files": [RULES], "evaluation_interval": "1m", "tests": [unit_test(name) for name in names]})
        encoded = base64.b64encode(content.encode()).decode()
        return host.run(f"echo {encoded} | base64 -d >/tmp/alerts.yml && promtool test rules /tmp/alerts.yml")

    return run


def test_every_alert_has_a_case(host):
    rules = [yaml.safe_load(host.file(path).content_string) for path in host.check_output(f"ls {RULES}").split()]
    alerts = {rule["alert"] for file in rules for group in file["groups"] for rule in group["rules"]}
    assert alerts == ALL.keys() - {"healthy"}


@pytest.mark.parametrize("name", ALL)
def test_alert_fires_once_on_its_series(promtool, name):
    done = promtool(name)
    assert done.rc == 0, done.stdout + done.stderr
