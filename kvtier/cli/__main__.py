"""`python -m kvtier.cli` is `kvtier`."""

from kvtier.cli import main

raise SystemExit(main())
