"""Where the files are that were sent with a job, on the machine that asks."""

from __future__ import annotations

import os


def package_folder() -> str:
    """Folder of the files that were sent, where this process belongs to a submitted job; empty elsewhere."""
    return current_folder() if os.environ.get("CLIFFLAB_PACKAGE") else ""


def current_folder() -> str:
    """The current folder; where another one has taken its place, that one, which becomes the current one.

    Nodes that share a machine and Ray's temporary folder share the folder of a job's files too, and each unpacks them
    anew over what the others use: the files are the same, the folder of those that came first is gone.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        again = os.environ.get("PWD", "")
        if not again:
            raise
        os.chdir(again)
        return again
