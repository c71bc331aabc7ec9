"""A FUSE server that stops answering when it is told to: python fuse_server.py MOUNT_POINT (root only, no libfuse).

It speaks as much of the protocol (linux/fuse.h, version 7.31) as it takes to show a directory with the files `ready` (which it
answers for), `stuck` (which it does not, from the moment it has read the request: so no signal ends whoever asks for it), and
`mute` (which can be opened and asked about, and is not read).
SIGUSR1 has it answer all that it owes. Prints "ready" once it is mounted.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import sys

from mesocosm.kernel.linux.libc import syscall

FORGET, LOOKUP, GETATTR, OPEN, READ, INIT, OPENDIR, READDIR, BATCH_FORGET, INTERRUPT = 2, 1, 3, 14, 15, 26, 27, 28, 42, 36
SILENT = (FORGET, BATCH_FORGET, INTERRUPT)  # nobody waits for an answer to these
RELEASE, FLUSH, RELEASEDIR, ACCESS = 18, 25, 29, 34
ROOT, READY, STUCK, MUTE = 1, 2, 3, 4
NAMES = {b"ready": READY, b"stuck": STUCK, b"mute": MUTE}
CONTENT = {READY: b"ready\n", STUCK: b"stuck\n", MUTE: b"#!/bin/true\n"}
OWED = {STUCK: (GETATTR, READ), MUTE: (READ,)}
DIRECT_IO = 1
_HEAD = struct.Struct("=IIQQIIII")


def attributes(node: int) -> bytes:
    """struct fuse_attr, which is valid for no time at all: everybody asks every time."""
    mode, size = (0o40755, 0) if node == ROOT else (0o100755, len(CONTENT[node]))
    return struct.pack("=QQQQQQIIIIIIIIII", node, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(code: int, node: int, body: bytes) -> bytes | int:
    """The body of an answer, or an errno."""
    if code == INIT:
        return struct.pack("=IIIIHHIIHHI28x", 7, 31, 4096, 0, 8, 8, 65536, 1, 1, 0, 0)
    if code == LOOKUP:
        found = NAMES.get(body.rstrip(b"\0"))
        return errno.ENOENT if found is None else struct.pack("=QQQQII", found, 0, 0, 0, 0, 0) + attributes(found)
    if code == GETATTR:
        return struct.pack("=QII", 0, 0, 0) + attributes(node)
    if code in (OPEN, OPENDIR):
        return struct.pack("=QII", 0, DIRECT_IO if node in OWED else 0, 0)
    if code == READ:
        _, offset, size = struct.unpack_from("=QQI", body)
        return CONTENT[node][offset : offset + size]
    return b"" if code in (READDIR, RELEASE, RELEASEDIR, FLUSH, ACCESS) else errno.ENOSYS


def main(point: str) -> None:
    """Serves until it is unmounted."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    syscall("mount", b"meso-test", os.fsencode(point), b"fuse", 0, options, target=point)
    owed: list[tuple[int, bytes | int]] = []
    is_silent = True

    def speak(*_: object) -> None:
        nonlocal is_silent
        is_silent = False

    wake, signalled = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGUSR1, speak)
    signal.set_wakeup_fd(signalled)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([device, wake], [], [])
        if wake in ready:
            os.read(wake, 64)
            for number, said in owed:
                reply(device, number, said)
            owed.clear()
        if device not in ready:
            continue
        try:
            request = os.read(device, 1 << 17)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                return
            continue
        _, code, number, node, _, _, _, _ = _HEAD.unpack_from(request)
        if code in SILENT:
            continue
        body = request[_HEAD.size :]
        said = answer(code, node, body)
        if code in OWED.get(node, ()) and is_silent:
            owed.append((number, said))
            print("asked", flush=True)
        else:
            reply(device, number, said)


def reply(device: int, number: int, said: bytes | int) -> None:
    """Sends an answer; whoever has asked may have given up."""
    code, body = (-said, b"") if isinstance(said, int) else (0, said)
    try:
        os.write(device, struct.pack("=IiQ", 16 + len(body), code, number) + body)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


if __name__ == "__main__":
    main(sys.argv[1])
