"""Sending work to a cluster as Ray jobs: what is sent, under which name, and what is checked before."""
