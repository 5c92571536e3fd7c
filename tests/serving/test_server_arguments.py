# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a server: limits, port and key."""

import pytest

from phase15.serving.arguments import Phase15ServerArguments


@pytest.mark.parametrize(
    "name", ["num_lanes", "max_tokens", "max_waiting", "max_body_bytes", "max_kept_conversations", "max_state_bytes"]
)
def test_limits_below_their_minimum_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is -1, but it must be"):
        Phase15ServerArguments(**{name: -1})


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(ValueError, match=f"`port` is {port}, but it must be from 0 to 65535"):
        Phase15ServerArguments(port=port)


def test_the_key_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PHASE15_API_KEY", raising=False)
    assert Phase15ServerArguments().read_keys() == []
    monkeypatch.setenv("PHASE15_API_KEY", "one")
    assert Phase15ServerArguments().read_keys() == ["one"]
    (tmp_path / "key").write_text("two\n\nthree of them \n")
    assert Phase15ServerArguments(api_key=str(tmp_path / "key")).read_keys() == ["two", "three of them"]
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="is empty, but it must hold the API key"):
        Phase15ServerArguments(api_key=str(tmp_path / "key")).read_keys()
    with pytest.raises(OSError):
        Phase15ServerArguments(api_key=str(tmp_path / "none")).read_keys()
