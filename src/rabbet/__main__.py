"""`python -m rabbet` is the command line."""

import sys

from rabbet.cli import main

if __name__ == "__main__":
    sys.exit(main())
