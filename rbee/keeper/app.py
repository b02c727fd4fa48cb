"""The command line (being written)."""


def main() -> None:
    raise SystemExit("rbee-keeper is not there yet")
