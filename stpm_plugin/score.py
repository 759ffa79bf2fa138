"""Score folders of images: ``python -m stpm_plugin.score``."""

import sys

from .commands.score import main
from .deployment.scorer import Scorer

__all__ = ["Scorer", "main"]

if __name__ == "__main__":
    sys.exit(main())
