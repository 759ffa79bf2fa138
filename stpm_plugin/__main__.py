"""Run anomalib's command line with STPM registered, whatever the environment says: ``python -m stpm_plugin train``."""

from anomalib.cli.cli import main

from . import demo_data, lightning_model  # noqa: F401 - importing them registers them

if __name__ == "__main__":
    main()
