"""Moved: `stpm explain`."""

import sys

from .commands.entry import moved

main = moved("explain")

if __name__ == "__main__":
    sys.exit(main())
