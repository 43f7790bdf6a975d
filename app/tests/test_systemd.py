import time
from types import SimpleNamespace
from unittest.mock import Mock

from emails import worker


def test_watchdog_pings_stop_when_the_loop_is_stuck(monkeypatch):
    told = []
    monkeypatch.setattr(worker.systemd, "notify", told.append)
    monkeypatch.setattr(worker.Systemd, "PERIOD", 0.05)
    monkeypatch.setattr(worker.Systemd, "STUCK", 0.5)
    loop = Mock()
    consumer = SimpleNamespace(timer=loop)
    step = worker.Systemd(consumer)

    def fed() -> bool:
        told.clear()
        time.sleep(0.3)
        return "WATCHDOG=1" in told

    step.start(consumer)
    try:
        assert fed()
        time.sleep(0.6)
        assert not fed(), "no ping is expected: the loop has not run"
        ((_, tick),) = (call.args for call in loop.call_repeatedly.call_args_list)
        tick()
        assert fed()
        time.sleep(0.6)
        step.stop(consumer)
        loop.call_repeatedly.return_value.cancel.assert_called_once()
        assert fed(), "a ping is expected while it reconnects to the broker"
    finally:
        step.shutdown(consumer)
    step.thread.join(timeout=5)
    assert not fed()
