"""The socket: how other programs speak to the agent, and nothing of what the agent then does.

=========== ================================================================================================
framing     bytes <-> messages; sans-IO. Every limit is checked on the raw bytes, before anything is decoded
messages    the table of methods: request type, right needed, how it is answered
authority   who a peer is (its process first, its uid second) and what it may do
service     what the agent must offer, and which call of it each method is
listening   the socket in the file system: made safely, taken away again, accepting whatever happens
outbox      what is on its way to one peer: bounded, and never waited for by anybody else
streams     one row of items to one peer, numbered and counted, whose end cannot be missed
connection  one peer: its frames in, its answers and streams out
server      all peers
trio_client the other end for trio programs; `mesocosm.kernel.client` (one file, no trio) is that for all others
=========== ================================================================================================

Theory: a peer may be slow, silent, gone, hostile or merely wrong, and none of that may cost another peer anything. So each
wait has a deadline, each queue a bound, each peer its own tasks, and a problem in one request ends that request.
The only things that end a connection are bytes that leave no way to know where the next frame starts, or that no
client of ours would send.
"""
