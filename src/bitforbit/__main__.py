"""``python -m bitforbit``."""

import sys

from bitforbit.cli import main

if __name__ == "__main__":
    sys.exit(main())
