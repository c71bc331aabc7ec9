"""A client in a process of its own, in pieces that tests put together: who connects, who speaks, when.

    python stranger.py SOCKET [WORD…]

Words are done in order: ``connect``; ``uid N`` (become that user); ``stop`` (print "ready", wait for a line); ``ask`` (PING, then
a launch of nothing; prints the code of each answer, or "ok"); ``pass N`` (send the connection over the descriptor N); ``take N``
(get it from there); ``run PROGRAM FILE`` (a program whose input is the file and whose output is the connection); ``read`` (prints
one answer's code). What cannot be done is printed as "errno N", and the rest is left out. Only the standard library, and not
even the rest of this file's directory: it is handed over as text, into containers too.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys

PING = bytes.fromhex("0000000a 940001a450494e479180")
LAUNCH = bytes.fromhex("00000012 940002ac4c41554e43485f47524f55509180")
CODES = (b"denied", b"bad_input", b"bad_frame", b"over_budget", b"conflict", b"internal")


def main(path: str, words: list[str]) -> None:
    """See the module."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    while words:
        match words.pop(0):
            case "connect":
                sock.connect(path)
            case "uid":
                os.setgroups([])
                os.setresuid(*[int(words.pop(0))] * 3)
            case "stop":
                print("ready", flush=True)
                sys.stdin.readline()
            case "ask":
                for frame in (PING, LAUNCH):
                    sock.sendall(frame)
                    print(answer(sock), flush=True)
            case "pass":
                with socket.socket(fileno=int(words.pop(0))) as way:
                    way.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))])
            case "take":
                with socket.socket(fileno=int(words.pop(0))) as way:
                    _, fds, _, _ = socket.recv_fds(way, 1, 1)
                sock = socket.socket(fileno=fds[0])
                sock.settimeout(60)
            case "run":
                program, file = words.pop(0), words.pop(0)
                with open(file, "rb") as request:
                    subprocess.run([program], stdin=request, stdout=sock.fileno(), check=True)
            case "read":
                print(answer(sock), flush=True)
            case word:
                raise ValueError(word)


def answer(sock: socket.socket) -> str:
    """The code in the next answer, or "ok"; "end" for none."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        if not (more := sock.recv(1)):
            return "end"
        data += more
    return next((code.decode() for code in CODES if b"\xa4code" + bytes([0xA0 + len(code)]) + code in data), "ok")


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except OSError as error:
        print("errno", error.errno, flush=True)
