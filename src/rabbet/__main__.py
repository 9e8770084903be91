"""`python -m rabbet` is the command line, too."""

import sys

from rabbet.cli import program

if __name__ == "__main__":
    sys.exit(program())
