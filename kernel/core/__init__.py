"""The pure core: values in, values out.

What lives here: names, units, the pod file's types, errors, the state tables, the tree, plans, the
launch transaction, supervision and the attenuation rule. What must not: trio, os, time, msgpack, pluggy,
ctypes, files, clocks, randomness. Whatever a function here needs to know, it is handed.

That one restriction pays three times: every rule can be tested in microseconds, a property-based test can
drive it through a million histories, and the same rule serves planning, launching, recovery and the manual.
"""
