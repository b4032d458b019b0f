"""`python -m fastgrpo`."""

import sys

from fastgrpo.cli import main

sys.exit(main())
