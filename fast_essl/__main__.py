"""`python -m fast_essl` is the `fast-essl` command."""

from fast_essl.cli import main

raise SystemExit(main())
