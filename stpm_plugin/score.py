"""Moved: `stpm score`. The class `Scorer`, for programs, stays here too."""

import sys

from .commands.entry import moved
from .deployment.scorer import Scorer

__all__ = ["Scorer", "main"]
main = moved("score")

if __name__ == "__main__":
    sys.exit(main())
