"""Adapters and models as matrices on disk: merge, extract, compress. Knows files, runs no model.

One linear is in memory at a time; nothing here has heard of servers or command lines.
"""
