"""A sample of tests/fuzz.py."""
import fuzz
import pytest

import sample


def test_malformed_files_and_flags_are_one_line(capsys):
    assert fuzz.main(["--n", "60", "--seed", "7"]) == [], capsys.readouterr().out


@pytest.mark.parametrize("broken", [lambda argv: 1 / 0, lambda argv: None])
def test_a_traceback_and_silence_are_found(broken, capsys, monkeypatch):
    monkeypatch.setattr(sample, "main", broken)
    assert fuzz.main(["--n", "6", "--seed", "1"])
    assert "wrong" in capsys.readouterr().out
