"""`python -m peka_lite` is the `peka-lite` command."""

import os
import sys

# Python puts the current folder first on the path. Modules that lie there may have come with received data: what is
# installed goes before them.
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from peka_lite.cli.main import main

raise SystemExit(main())
