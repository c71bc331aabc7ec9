"""Numbers of the kernel's interface, each with the header it comes from. Values only.

System call numbers are per architecture; everything else here is the same on all that mesocosm runs on.
"""

from __future__ import annotations

import os

# asm/unistd_64.h; from 424 on the numbers are the same everywhere.
_COMMON = {
    "pidfd_send_signal": 424, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "pidfd_open": 434, "clone3": 435, "close_range": 436, "openat2": 437, "faccessat2": 439, "mount_setattr": 442,
}  # fmt: skip
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "rt_sigaction": 13, "rt_sigprocmask": 14, "ioctl": 16, "socket": 41, "execve": 59,
    "exit": 60, "wait4": 61, "chdir": 80, "fchdir": 81, "fchmod": 91, "setsid": 112, "setgroups": 116, "setresuid": 117,
    "setresgid": 119, "capset": 126, "pivot_root": 155, "prctl": 157, "mount": 165,
    "umount2": 166, "sethostname": 170, "exit_group": 231, "keyctl": 250,
    "mkdirat": 258, "mknodat": 259, "fchownat": 260, "symlinkat": 266, "unshare": 272, "signalfd4": 289, "dup3": 292,
    "prlimit64": 302, "setns": 308, "seccomp": 317, "execveat": 322, "openat": 257, "poll": 7, "fchown": 93,
    "mmap": 9, "munmap": 11, "getppid": 110, "arch_prctl": 158, "waitid": 247, "clock_gettime": 228, "fstat": 5, "fstatfs": 138,
    "inotify_init1": 294, "inotify_add_watch": 254,
    "fallocate": 285,
}  # fmt: skip
_AARCH64 = {
    "read": 63, "write": 64, "close": 57, "rt_sigaction": 134, "rt_sigprocmask": 135, "ioctl": 29, "socket": 198, "execve": 221,
    "exit": 93, "wait4": 260, "chdir": 49, "fchdir": 50, "fchmod": 52, "setsid": 157, "setgroups": 159, "setresuid": 147,
    "setresgid": 149, "capset": 91, "pivot_root": 41, "prctl": 167, "mount": 40,
    "umount2": 39, "sethostname": 161, "exit_group": 94, "keyctl": 219,
    "mkdirat": 34, "mknodat": 33, "fchownat": 54, "symlinkat": 36, "unshare": 97, "signalfd4": 74, "dup3": 24,
    "prlimit64": 261, "setns": 268, "seccomp": 277, "execveat": 281, "openat": 56, "fchown": 55,
    "mmap": 222, "munmap": 215, "getppid": 173, "waitid": 95, "clock_gettime": 113, "fstat": 80, "fstatfs": 44,
    "inotify_init1": 26, "inotify_add_watch": 27,
    "fallocate": 47,
}  # fmt: skip
ARCH = os.uname().machine
SYS: dict[str, int] = {**(_AARCH64 if ARCH == "aarch64" else _X86_64), **_COMMON}

# linux/sched.h
CLONE_FILES = 0x400
CLONE_PARENT = 0x8000
CLONE_NEWTIME = 0x80
CLONE_NEWNS = 0x20000
CLONE_PIDFD = 0x1000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_CLEAR_SIGHAND = 0x100000000
CLONE_INTO_CGROUP = 0x200000000
NAMESPACE_FLAGS = {
    "mount": CLONE_NEWNS, "pid": CLONE_NEWPID, "uts": CLONE_NEWUTS, "ipc": CLONE_NEWIPC, "net": CLONE_NEWNET,
    "user": CLONE_NEWUSER, "cgroup": CLONE_NEWCGROUP, "time": CLONE_NEWTIME,
}  # fmt: skip

# asm-generic/fcntl.h, linux/fcntl.h, linux/openat2.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
AT_EXECVE_CHECK = 0x10000  # Linux 6.14
AT_EACCESS = 0x200
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
CLOSE_RANGE_CLOEXEC = 4

# linux/mount.h
MS_PRIVATE = 0x40000
MS_REC_PRIVATE = 0x4000 | MS_PRIVATE
MS_REC_SLAVE = 0x4000 | 0x80000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTRS = {"ro": MOUNT_ATTR_RDONLY, "nosuid": MOUNT_ATTR_NOSUID, "nodev": MOUNT_ATTR_NODEV, "noexec": MOUNT_ATTR_NOEXEC}

# linux/wait.h
P_ALL = 0
P_PID = 1
WEXITED = 4
WNOWAIT = 0x01000000
WALL = 0x40000000

# linux/prctl.h, linux/capability.h, linux/securebits.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAP_LAST = 40
CAPABILITY_VERSION_3 = 0x20080522

# asm-generic/signal-defs.h, linux/signal.h
SIG_BLOCK = 0
SIG_UNBLOCK = 1
SIG_SETMASK = 2
SIGPIPE = 13
SIGXFSZ = 25

# linux/keyctl.h, linux/sockios.h, linux/seccomp.h, linux/if.h
KEYCTL_JOIN_SESSION_KEYRING = 1
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
SECCOMP_SET_MODE_FILTER = 1
SO_PEERPIDFD = 77
