"""An isolator: containers with the label `cache = "64MiB"` get that much memory as a directory, /var/cache.

Copy this file, rename it, change what `plan` answers. It is a pure function: the kernel asks, carries the answer
out, remembers it, shows it in `meso plan`, and undoes it.
"""

from collections.abc import Mapping

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.plan import is_apart
from mesocosm.kernel.core.resources import size


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """A tmpfs and the variable that tells programs of it; None for containers without the label."""
    asked = container.labels.get("cache")
    if asked is None or container.namespaces["mount"] != "own":
        return None
    tmpfs = {
        "target": "/var/cache",
        "size": size(asked, f"{container.path}.labels.cache"),  # a wrong unit refuses the group, and names the field
        "mode": 0o1777,
        "uid": grants["uid_base"] if is_apart("user", container.namespaces["user"], parent) else 0,
        "flags": ["nosuid", "nodev"],
        "create": "dir",
    }
    return Plan(setup=[Step("tmpfs", tmpfs)], env={"XDG_CACHE_HOME": "/var/cache"})
