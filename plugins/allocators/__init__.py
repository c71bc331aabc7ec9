"""Allocators: who may use how much of the machine. None yet."""
