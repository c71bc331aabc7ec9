"""The runtime: what the pure core decides, done with trio on a real (or simulated) machine.

`agent` is the service that the socket serves. Below it: `launch` carries a transaction out, `supervisor` keeps
one nursery per container, `recovery` grows the same nurseries from the `ledger`, `undo` is the closed list of
ways to unmake something, `kinds` the kernel's own kinds of effects, `machine` the seam to the operating system.
"""
