"""The process that is Ray's driver; a module of its own, so that what it sends to actors is found by name there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tidemill.outpost.ray import drive

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    drive(Path(sys.argv[1]))
