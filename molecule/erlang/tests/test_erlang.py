"""An Erlang that runs what RabbitMQ needs, and stays at its version."""

from __future__ import annotations


def erl(host, expression):
    return host.check_output(f"erl -noshell -eval 'io:format(\"~p\", [{expression}]), halt().'")


def test_release_is_the_one_asked_for(host):
    assert erl(host, "erlang:system_info(otp_release)") == '"27"'


def test_applications_that_rabbitmq_needs_start(host):
    assert erl(host, "[application:ensure_all_started(A) || A <- [ssl, mnesia, os_mon, inets, eldap, xmerl]]").count("{ok") == 6


def test_tls_speaks_1_3(host):
    # A node's configuration of ssl is read when ssl is started.
    supported = "begin {ok, _} = application:ensure_all_started(ssl), proplists:get_value(supported, ssl:versions()) end"
    assert "'tlsv1.3'" in erl(host, supported)


def test_just_in_time_compiler_is_in(host):
    assert erl(host, "erlang:system_info(emu_flavor)") == "jit"


def test_another_version_is_not_taken(host):
    """What apt would do: the pin outranks whatever else a repository offers."""
    policy = host.check_output("apt-cache policy erlang-base")
    candidate = next(line for line in policy.splitlines() if "Candidate:" in line)
    assert candidate.split(":", 1)[1].strip().startswith("1:27.")
    assert " 1001" in policy
