"""The contract that every isolator keeps, and what is particular to this one."""

import mesocosm_cachedir
import pytest

from mesocosm.kernel.contracts import ContainerSpec
from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.testing import GRANTS, HOSTS, IsolatorContract

HOST = HOSTS["root, cgroup v2"]


class TestContract(IsolatorContract):
    isolator = mesocosm_cachedir


def test_a_container_that_asks_for_a_cache_gets_one():
    container = ContainerSpec(id="web", command=("true",), labels={"cache": "16MiB"})
    plan = mesocosm_cachedir.plan(container=container, parent=None, host=HOST, grants=GRANTS)
    assert plan.setup[0].args["size"] == 16 * 2**20
    assert plan.env == {"XDG_CACHE_HOME": "/var/cache"}


def test_others_get_nothing():
    assert mesocosm_cachedir.plan(ContainerSpec(id="web", command=("true",)), None, HOST, GRANTS) is None


def test_a_wrong_unit_is_refused_with_the_field():
    container = ContainerSpec(id="web", command=("true",), labels={"cache": "lots"}, path="$.tasks[0]")
    with pytest.raises(SpecError) as caught:
        mesocosm_cachedir.plan(container, None, HOST, GRANTS)
    assert caught.value.fields["path"] == "$.tasks[0].labels.cache"
