"""`python -m dvn_cli` is `dvn`."""

from dvn_cli.cli import main

if __name__ == "__main__":
    main()
