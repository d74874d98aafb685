"""``python -m clifflab``."""

from clifflab.cli import main

if __name__ == "__main__":
    main()
