import parts
import pytest

MAKEFILE = """
good:
\t@echo '===== 3 passed in 1.20s ====='
bad:
\t@echo 'FAILED tests/test_x.py::test_y - assert 1 == 2'; echo '==== 1 failed, 2 passed in 61.20s (0:01:01) ===='; exit 1
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*targets: str) -> tuple[int, str]:
        (tmp_path / "Makefile").write_text(MAKEFILE)
        monkeypatch.setattr(parts, "ROOT", tmp_path)
        monkeypatch.setattr(parts, "LOGS", tmp_path / "logs")
        monkeypatch.setattr("sys.argv", ["parts.py", *targets])
        return parts.main(), capsys.readouterr().out

    return run


def test_passing_target_prints_one_line_and_logs_its_output(run, tmp_path):
    status, output = run("good")
    assert status == 0
    assert output.splitlines()[-1].startswith("1 of 1 passed in")
    assert "good                      3 passed\n" in output
    assert "=====" not in output
    assert "=====" in (tmp_path / "logs/good.log").read_text()


def test_summary_names_failed_target_and_test(run):
    status, output = run("bad", "good")
    assert status == 1
    table = output.splitlines()[-4:]
    assert table[0].split() == ["FAILED", "0", "min", "00", "s", "bad", "1", "failed,", "2", "passed"]
    assert table[1].startswith("ok")
    assert table[2] == "  bad: FAILED tests/test_x.py::test_y - assert 1 == 2"
    assert table[3].startswith("1 of 2 passed in")
    assert "---- bad: output ----" in output
