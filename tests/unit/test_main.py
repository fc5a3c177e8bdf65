"""The command without its extra."""

from __future__ import annotations

import importlib.util

import pytest

from schedule_finder import __main__


def test_the_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"ruptures", "matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "ruptures, matplotlib" in message
    assert "pip install 'adaptinfer[profile]'" in message
    assert len(message.splitlines()) == 1
