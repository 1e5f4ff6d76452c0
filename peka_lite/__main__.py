"""`python -m peka_lite` is the `peka-lite` command."""

from peka_lite.cli import main

raise SystemExit(main())
