"""Executors: how a group is arranged into containers, and what follows when one of them ends."""
