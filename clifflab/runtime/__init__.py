"""Carrying a study out: in this process, or in Ray actors. The only place that knows Ray."""
