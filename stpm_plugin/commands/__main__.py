"""``python -m stpm_plugin.commands`` is ``stpm``, where the folder of console scripts is not on the path."""

import sys

from .entry import main

sys.exit(main())
