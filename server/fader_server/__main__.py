"""`python -m fader_server` is `fader`."""

import sys

from fader_server.cli import main

sys.exit(main())
