"""The command `meso`: thin verbs over the client.

What lives here: reading arguments and pod files, starting an agent where none runs, and putting answers
into words, tables and live trees. What must not: decisions. A verb asks the agent (or, for `plan`, `doctor`
and `plugins`, the same pure planner that the agent uses) and shows what it says; whatever another program could not
get through the socket as well does not belong here.

Theory: a command is started often and lives briefly, so modules are loaded by the verb that needs them. `main` and
`parser` need the standard library only; trio, msgspec and the plug-ins are loaded by `agent`, `plan`, `doctor`
and `plugins` alone.
"""

from __future__ import annotations

import sys

if "plan" in sys.argv[1:4]:
    # Planning touches nothing, not even Python's own caches; later than here, half of our modules would have theirs written.
    sys.dont_write_bytecode = True
