"""``python -m fasttrain``: the command line."""

import sys

from fasttrain.cli import main

sys.exit(main())
