"""Resource names parse to what they were made of, and nothing else parses."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import BadNameError
from treadle.names import RunName, check_id, check_tenant, is_adapter, parse_adapter, parse_run, plain_base

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
TENANTS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)


@given(TENANTS, IDS, IDS)
def test_names_round_trip(tenant: str, run: str, adapter: str) -> None:
    """Formatting then parsing gives the parts back."""
    name = RunName(tenant, run)
    assert parse_run(str(name)) == name
    revision = name.adapter("revisions", adapter)
    assert parse_adapter(str(revision)) == revision
    assert revision.run_name == name
    assert is_adapter(str(revision))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "runs/x",
        "tenants//runs/x",
        "tenants/a/runs/",
        "tenants/A/runs/x",
        "tenants/a/runs/x/",
        "tenants/a/runs/../x",
        "tenants/a/runs/x\n",
    ],
)
def test_other_strings_are_refused(bad: str) -> None:
    """No path tricks, no empty parts."""
    with pytest.raises(BadNameError):
        parse_run(bad)
    with pytest.raises(BadNameError):
        parse_adapter(bad)


@given(st.text(max_size=80))
def test_any_text_is_accepted_or_refused_but_never_crashes(text: str) -> None:
    """Only BadNameError ever comes out."""
    for check in (parse_run, parse_adapter, check_id, check_tenant):
        with contextlib.suppress(BadNameError):
            check(text)  # type: ignore[operator]


def test_a_base_keeps_its_name_without_its_precision() -> None:
    """Only what says how a base is quantized is taken off."""
    assert plain_base("org/model@nf4") == plain_base("org/model@int8") == plain_base("org/model") == "org/model"
    assert plain_base("model@v2") == "model@v2"
