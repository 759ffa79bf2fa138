"""Drawn demo images, so that a first run needs no download."""
