"""The agent's own place among control groups.

A group that holds processes cannot hand its controllers on to groups below (cgroups(7), "no internal processes"). A
service with ``Delegate=yes`` starts the agent in the very group that is delegated to it: so it goes into a leaf of its
own first, and whatever it starts (the launcher) is born there. Nobody else is moved: where a shell stands beside the
agent, limits are refused, and `doctor` says why.
"""

from __future__ import annotations

import os

from mesocosm.kernel.linux import probe


def enter_leaf(run_id: str) -> str | None:
    """Moves this process into ``mesocosm-RUN-agent`` below its delegated group, if it stands in that group, alone.

    The leaf's path; None if nothing was moved. The leaf stays when the agent ends: its launcher may live on in it, and
    what was delegated goes with the service.
    """
    base = probe.delegated()
    if base is None or not os.path.exists(f"{base}/cgroup.type"):  # the root may hold processes beside groups
        return None
    with open(f"{base}/cgroup.procs") as file:
        standing = file.read().split()
    if standing != [str(os.getpid())]:
        return None
    leaf = f"{base}/mesocosm-{run_id}-agent"
    try:
        os.makedirs(leaf, exist_ok=True)
        with open(f"{leaf}/cgroup.procs", "w") as procs:
            procs.write("0")
    except OSError:
        return None  # not a reason not to serve: limits are refused then
    return leaf
