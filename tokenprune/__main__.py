"""`python -m tokenprune`."""

from __future__ import annotations

from tokenprune.cli.app import main

if __name__ == "__main__":
    main()
