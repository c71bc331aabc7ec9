"""Isolators: pure functions from a container to a part of its plan, one concern per module."""
