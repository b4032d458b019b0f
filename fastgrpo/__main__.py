"""`python -m fastgrpo`."""

import sys

from fastgrpo.cli.main import main

sys.exit(main())
