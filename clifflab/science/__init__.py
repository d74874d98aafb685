"""The measurements: pure functions over arrays and tables. No Ray, no files, no global state."""
