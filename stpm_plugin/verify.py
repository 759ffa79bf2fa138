"""Moved: `stpm verify`."""

import sys

from .commands.entry import moved

main = moved("verify")

if __name__ == "__main__":
    sys.exit(main())
