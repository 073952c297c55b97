from __future__ import annotations

import pytest

from phi3_mlflow.config.parameters import PARAMETERS
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.server.settings import KEY_VARIABLE, ServerSettings
from phi3_mlflow.stages.serve import Serve

KEY = "sixteen-letters-at-least"


def _read(environment: dict[str, str] | None = None, **given: str) -> ServerSettings:
    values = {name: PARAMETERS[name].default for name in Serve.parameters}
    return ServerSettings.read(values | given, environment or {})


def test_defaults_listen_on_this_machine_alone() -> None:
    made = _read()
    assert (made.host, made.port, made.loopback_only, made.trace) == (
        "127.0.0.1",
        8000,
        True,
        "off",
    )


@pytest.mark.parametrize(("batch", "expected"), [("auto", 6), ("1", 1), ("3", 3)])
def test_what_runs_is_computed_together_unless_less_is_asked_for(batch: str, expected: int) -> None:
    assert _read(running="6", batch=batch).batch == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_another_address_needs_a_key_and_the_refusal_names_the_way_out(host: str) -> None:
    with pytest.raises(UserError, match=KEY_VARIABLE) as caught:
        _read(host=host)
    assert "127.0.0.1" in str(caught.value)
    made = _read({KEY_VARIABLE: KEY}, host=host)
    assert not made.loopback_only
    assert KEY not in repr(made)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert _read(host=host).loopback_only


@pytest.mark.parametrize("key", ["short", KEY + "\n", " " + KEY, "ümläut-" + KEY])
def test_a_key_that_cannot_work_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UserError, match=KEY_VARIABLE) as caught:
        _read({KEY_VARIABLE: key})
    assert key not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = {"host": "my-server", "running": "0", "batch": "99", "waiting": "-1"}
    with pytest.raises(UserError) as caught:
        _read(port="http", body_limit_kb="", **wrong)
    for word in (*(f"{name} = {value!r}" for name, value in wrong.items()), "body_limit", "port"):
        assert word in str(caught.value)
