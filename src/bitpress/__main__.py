"""`python -m bitpress`."""

from bitpress.cli import main

main()
