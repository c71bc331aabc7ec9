"""What to do about an errno when nobody closer knows better.

What lives here: one sentence for each errno that a launch can meet, for people. What must not: advice that depends on the step
(launcher.diagnosis has that) or on the plug-in (its own errors carry theirs). Source: errno(3) and the manual page of each call.
"""

from __future__ import annotations

from collections.abc import Mapping

ADVICE: Mapping[str, str] = {
    "EACCES": "who does it has no right to: look at owner and mode of every part of the path",
    "EAGAIN": "a limit on processes is reached (pids of a control group, ulimit -u, kernel.pid_max), or memory is short",
    "EBUSY": "somebody is using it: a process in it, or a mount on it",
    "EDQUOT": "a user's quota is used up, of disk or of keys",
    "EEXIST": "something of that name is there already",
    "EINVAL": "the kernel does not take this value or this combination; an older kernel may not know it",
    "EIO": "the device or the server behind it fails: see dmesg",
    "ELOOP": "there is a link where none is followed: name the place that the link leads to",
    "EMFILE": "the agent has as many files open as it may: start it with a larger ulimit -n",
    "ENAMETOOLONG": "a name may have 255 bytes and a path 4095: a shorter run directory or name",
    "ENFILE": "the machine has as many files open as it may: fs.file-max",
    "ENODEV": "this kernel has no such file system or device: see meso doctor",
    "ENOENT": "a part of that path does not exist",
    "ENOMEM": "no memory is left for it, on the machine or in the control group that the agent stands in",
    "ENOSPC": "no room is left there (df -h, df -i), or a limit is reached: on mounts (fs.mount-max), namespaces, control groups",
    "ENOSYS": "this kernel does not know the call, or a filter around the agent forbids it: see meso doctor",
    "ENOTDIR": "a part of that path is a file",
    "EOPNOTSUPP": "the file system there cannot do this",
    "EPERM": "the agent lacks a capability for it, or this machine's policy forbids it: see meso doctor",
    "EROFS": "the file system there is read-only",
    "ESRCH": "the process has ended meanwhile",
    "ETXTBSY": "the file is open for writing",
}
