"""``python -m aionpredis``: the same as the command ``aionpredis``."""

from aionpredis.cli import main

main()
