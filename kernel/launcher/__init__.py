"""The launcher: the small process that clones every container, is its parent, and reaps it.

`contract` is what the runtime sees of it, `table` and `compile` turn setup steps into a table of system calls
(pure), `walk` runs a table in the child, `zygote` is the process itself, `protocol` the messages between it
and the agent, `client` the agent's end.
"""
