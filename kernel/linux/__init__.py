"""Every system call of mesocosm, and its only ctypes.

One name per system call, as in its man page; a failure is an OSError that carries the errno, the path and (in
`.syscall`) the name of the call. Nothing here decides anything: which calls, in which order, is decided by
plans and written down in tables. Imports nothing of the kernel but core.errors, so that the launcher can load
it in a few milliseconds.
"""
