"""`python -m realflow` is the command `realflow`."""

import sys

from realflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
