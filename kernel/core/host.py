"""What a planner may know about the machine: facts, probed once, frozen.

`linux.probe` fills this in by looking only (it makes nothing). Planners get it as an argument, so the same
facts always give the same plan, and a test can plan for any machine it likes.
"""

from __future__ import annotations

import msgspec


class CgroupFacts(msgspec.Struct, frozen=True):
    """The control groups that mesocosm may make below.

    `mode` is what planning chooses by: "v2" (limits and tracking in cgroup v2), "v1" (limits in v1), "hybrid"
    (limits in v1, tracking and killing in a v2 tree without controllers) or "none" (no cgroup may be made).
    `v1` maps a controller to the absolute directory under which ours are made; `v2` is that directory for v2.
    `limits` are the names out of {"cpu", "memory", "pids"} that can really be set; `reason` says why others cannot.
    """

    mode: str = "none"
    v1: dict[str, str] = {}
    v2: str | None = None
    limits: tuple[str, ...] = ()
    reason: str = ""


class Account(msgspec.Struct, frozen=True):
    """One line of passwd(5)."""

    uid: int
    gid: int
    home: str


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The machine as planning sees it. Paths are absolute."""

    kernel: tuple[int, int, int] = (6, 1, 0)
    arch: str = "x86_64"
    uid: int = 0  # of the user that runs the agent, outside any user namespace of ours
    rootless: bool = False  # an ordinary user's agent: it and all its containers live in one user namespace
    run_dir: str = "/run/mesocosm"
    state_dir: str = "/var/lib/mesocosm"
    run_id: str = "000000"  # names the cgroups: mesocosm-RUN
    boot_id: str = ""
    features: frozenset[str] = frozenset()  # see linux.probe.FEATURES
    namespaces: frozenset[str] = frozenset()  # kinds this kernel has
    capabilities: frozenset[str] = frozenset()  # what the agent may hand on, names without CAP_
    cgroups: CgroupFacts = CgroupFacts()
    uid_ranges: int = 0  # how many disjoint id ranges the pool has; 0: containers share the user's own id
    uid_count: int = 1  # ids in each
    listing: dict[str, dict[str, str]] = {}  # directory → name → "dir", "file" or "-> target" of a link
    submounts: tuple[str, ...] = ()  # mount points of the host, sorted
    rlimits: dict[str, tuple[int, int]] = {}  # the agent's own (soft, hard): no container can get more
    accounts: dict[str, Account] = {}  # the host's passwd(5), for containers that see the host's /etc
    memory: int = 0  # bytes
    cpus: int = 1

    def container_dir(self, container_id: str) -> str:
        """Where a container's logs and sandbox are."""
        return f"{self.run_dir}/containers/{container_id}"

    def has(self, feature: str) -> bool:
        """Whether the kernel can do `feature`."""
        return feature in self.features
