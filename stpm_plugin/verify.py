"""Compare an export with its checkpoint: ``python -m stpm_plugin.verify``."""

import sys

from .commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
