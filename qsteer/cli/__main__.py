"""``python -m qsteer.cli`` is ``qsteer``."""

from qsteer.cli import main

main()
