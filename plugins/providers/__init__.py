"""Providers: what containers need from outside (images, volumes, networks). None yet."""
