"""`python -m deltatune` is the command line."""

import sys

from deltatune.cli import main

sys.exit(main())
