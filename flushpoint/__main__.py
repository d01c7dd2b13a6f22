"""`python -m flushpoint` is the command `flushpoint`."""

import sys

from flushpoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
