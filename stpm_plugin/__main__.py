"""Run anomalib's command line with STPM registered, whatever the environment says: ``python -m stpm_plugin train``."""

import sys

from . import __version__
from .commands.entry import COMMANDS

HELP = """stpm_plugin {version}: STPM for anomalib.

`python -m stpm_plugin fit|train|test|predict|export ...` is anomalib's own command line, with STPM in it.
`stpm {commands} ...` are this package's commands.
Add --help to any of them to see its options."""


def main() -> None:
    """Print the help or the version, or run anomalib's command line."""
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(HELP.format(version=__version__, commands="|".join(COMMANDS)))
        return
    if sys.argv[1:2] == ["--version"]:
        print(f"stpm_plugin {__version__}")
        return
    from anomalib.cli.cli import main as run

    from .demo import demo_data  # noqa: F401 - importing it registers it
    from .training import lightning_model  # noqa: F401 - likewise

    run()


if __name__ == "__main__":
    main()
