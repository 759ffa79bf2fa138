"""Scripts that make the figures of the README and of ``results/``; they import the package, never the reverse."""
