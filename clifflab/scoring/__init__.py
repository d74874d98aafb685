"""Scoring corpora of any size: rows in, cliffs out, each exactly once."""
