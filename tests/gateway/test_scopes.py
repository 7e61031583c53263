"""Every public method has a scope; everything else is refused."""

import pytest

from treadle.errors import AccessError
from treadle_gateway.scopes import METHOD_SCOPES, check_scope
from treadle_gateway.service import PUBLIC_SERVICES, path
from treadle_service.principal import SCOPES, Principal


def test_the_table_lists_exactly_the_public_methods() -> None:
    """A new RPC without an entry would be unreachable; an entry without an RPC would be a typing error."""
    assert set(METHOD_SCOPES) == {path(method) for service in PUBLIC_SERVICES for method in service.methods}
    assert {scope for scopes in METHOD_SCOPES.values() for scope in scopes} == SCOPES


def test_a_method_that_is_not_listed_is_refused_to_everybody() -> None:
    """Default deny, also for a key with all scopes."""
    with pytest.raises(AccessError) as caught:
        check_scope(Principal("acme", SCOPES), "/treadle.v1.TrainingService/StealWeights")
    assert caught.value.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize("method", sorted(METHOD_SCOPES))
def test_a_key_without_the_scope_is_refused(method: str) -> None:
    """The internal scope is none that a key can have."""
    wanted = METHOD_SCOPES[method]
    check_scope(Principal("acme", frozenset(wanted[:1])), method)
    with pytest.raises(AccessError):
        check_scope(Principal("acme", (SCOPES | {"internal"}) - set(wanted)), method)
