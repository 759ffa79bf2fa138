"""Write a file whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import STPMError


def write_whole(target: Path, content: bytes, remedy: str) -> None:
    """Write to a temporary file next to the target, then move it there; a full disk leaves an older file as it is.

    Args:
        target: The file; its folder is made if need be.
        content: All of it.
        remedy: What mends a failure besides making room, for the error.

    Raises:
        STPMError: It cannot be written.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(target)
    except OSError as error:
        msg = f"{target} cannot be written ({error.strerror}): make room, or {remedy}."
        raise STPMError(msg) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
