"""No word from pydicom while it reads: its warnings and logs repeat values of elements, the patient's among them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_lock = threading.Lock()
_inside = 0
_restore = ExitStack()


@contextmanager
def discreet() -> Iterator[None]:
    """Drop warnings and pydicom's log lines in a block; threads may be in such blocks at the same time."""
    global _inside
    with _lock:
        if _inside == 0:
            _silence()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore.close()


def _silence() -> None:
    _restore.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    log = logging.getLogger("pydicom")
    _restore.callback(setattr, log, "disabled", log.disabled)
    log.disabled = True
