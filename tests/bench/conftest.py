"""The suite is not part of the package: its tests take it from the tree."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent))  # at the end: fasttrain stays the one that is installed
