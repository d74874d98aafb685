"""Repair: which examples a model is tuned on, and what it is to write instead (SPEC section 6)."""
