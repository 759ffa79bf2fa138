"""Draw what a trained model sees: ``python -m stpm_plugin.explain``."""

import sys

from .commands.explain import main

if __name__ == "__main__":
    sys.exit(main())
