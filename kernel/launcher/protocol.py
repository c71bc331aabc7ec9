"""The messages between the agent and the launcher, as a table. A SOCK_SEQPACKET socket, one msgpack array a message.

    request (agent → launcher)      [number, VERB, body]             + descriptors
    answer  (launcher → agent)      [number, "ok", body]             + a pidfd for "stage" and each living line of "inventory"
                                    [number, "failed", {row, errno, message?}]
    news    (launcher → agent)      [0, "news", [[KIND, body], …]]   all that one turn of its loop has to tell, at most 100

Number 0 in a request: no answer is wanted (acknowledge, release).

    VERB          body                                                descriptors
    stage         {id, barrier, parent, note, user_map, owner,        those that the table mentions, in its order
                   enter_pid, the fields of table.Table};
                  rows and blob may instead be in the last descriptor
    release       {barrier}                                           -
    abort         {barrier}                                           -
    discard       {id}                     ends one that is staging or staged, answers when it is reaped
    acknowledge   {ids}                                               -
    inventory     {}                                                  -
    view          {name, entries}                                     one per entry that says so
    hello         {}                       answered by a launcher that serves: {build}
    upgrade       {argv}                   executes it in place; answered only if it does not   the program to execute
    adopt         {lines: [{id, barrier, pid, birth, note}]}          the pidfd of each: containers of a launcher that was killed
    stop          {}                                                  -

    KIND          body
    started       {id, time}
    exec_failed   {id, row, errno, released}   not released: it could not even wait at its barrier
    ended         {id, status, user_us, system_us, max_rss_kib, time, why?}   status null: nobody knows, for the reason `why`
    not_released  {barrier, message}       of a release that wanted no answer

An inventory too large for one message comes in several: all answers but the last are "more" instead of "ok".

One agent is served at a time; a new connection replaces the old one with its first message, since the old agent is
dead then (two agents on one run directory are kept apart by a lock). What an agent has asked is not answered to its
successor. Notices that nobody was there to hear are not kept, but what they said is: an `ended` stays in the
inventory until it is acknowledged.
"""

from __future__ import annotations

# The largest message; beyond it the table travels in a memfd. Linux allows a little less than net.core.wmem_default.
MAX_MESSAGE = 131_072
MAX_FDS = 250  # SCM_MAX_FD is 253
SOCKET = "launcher.sock"
UNCLAIMED = 300.0  # seconds; core.states says what it is, and a test that the two are the same
