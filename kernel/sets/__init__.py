"""Plug-in sets: which plug-ins, in which order, from where.

`selection` merges set files (pure), `loading` imports what a set names and nothing else, `planning` asks the
loaded isolators for plans.
"""
