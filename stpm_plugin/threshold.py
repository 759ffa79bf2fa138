"""Set an exported model's thresholds anew: ``python -m stpm_plugin.threshold``."""

import sys

from .commands.threshold import main

if __name__ == "__main__":
    sys.exit(main())
