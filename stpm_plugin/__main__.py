"""Run anomalib's command line with STPM registered, whatever the environment says: ``python -m stpm_plugin train``."""

from anomalib.cli.cli import main

from .demo import demo_data  # noqa: F401 - importing it registers it
from .training import lightning_model  # noqa: F401 - likewise

if __name__ == "__main__":
    main()
