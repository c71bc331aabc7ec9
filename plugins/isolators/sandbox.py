"""A container's own directory: its sandbox, its stdout and stderr, and the variables that tell it about them.

What lives here: RUN_DIR/containers/ID with stdout, stderr and sandbox/. What does not: the root directory.

stdout and stderr are plain files that are appended to: nothing stands between the program and its log, so
nothing can stall it, lose lines, or die before it. They live until the container's record is removed.

The directory has one undo for the whole tree. Entries below need none of their own: they exist only inside it.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesocosm.kernel import Effect, Fact, Grant, Plan, Step, Undo, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.plan import is_apart

SANDBOX = "/sandbox"
_NULL = [Step("stdio", {"fd": None, "number": number}) for number in range(3)]


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan:
    """The directory; for a program also its sandbox, logs and standard streams."""
    directory = host.container_dir(container.id)
    made = {"path": directory, "mode": 0o750, "uid": 0, "fresh": True}  # never somebody else's logs, or files
    base = Effect("directory", made, (Undo("remove_tree", directory),), keep=True)
    if container.is_pause:
        # Holds the pod's shared volumes; `pause` itself reads and writes nothing.
        return Plan(effects=[base], setup=_NULL)
    sandbox = f"{directory}/sandbox"
    budget = {} if container.log is None else {"budget": container.log}
    effects = [
        base,
        Effect("directory", {"path": sandbox, **_owner(container, parent, grants)}, keep=True),
        Effect("log", {"path": f"{directory}/stdout", **budget}, keep=True),
        Effect("log", {"path": f"{directory}/stderr", **budget}, keep=True),
    ]
    setup = [
        _NULL[0],
        Step("stdio", {"fd": Fact(2, "fd"), "number": 1}),
        Step("stdio", {"fd": Fact(3, "fd"), "number": 2}),
    ]
    share = container.namespaces.get("mount", "own")
    seen = SANDBOX
    if share == "own":
        effects.append(Effect("mount_tree", {"source": sandbox, "recursive": False}))
        place = {"fd": Fact(4, "fd"), "target": SANDBOX, "read_only": False, "create": "dir", "foreign": False}
        setup.append(Step("bind", place))
    elif not is_apart("mount", share, parent):
        seen = sandbox
    # else: it lives in its parent's mounts and sees the parent's sandbox at the same place
    return Plan(effects=effects, setup=setup, env={"MESOCOSM_ID": container.id, "MESOCOSM_SANDBOX": seen})


def _owner(container: ContainerSpec, parent: ContainerPlan | None, grants: Mapping[str, Grant]) -> dict[str, object]:
    """Root inside owns its sandbox. Another user inside has an id that is only known with the grant: the directory
    is then open to all, which are those inside, because nobody else passes the directory around it."""
    has_users = is_apart("user", container.namespaces.get("user", "own"), parent)
    is_root = container.user.partition(":")[0] in ("0", "root")
    return {"mode": 0o755 if is_root else 0o1777, "uid": grants["uid_base"] if has_users else 0}
