"""Run the `peka-lite` command as `python -m peka_lite`."""

import os
import sys

# Python puts the current folder first on the path. It may contain modules that came with received data, so installed
# packages go first.
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))

from peka_lite.cli.main import main

raise SystemExit(main())
