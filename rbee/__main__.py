"""``python -m rbee`` is ``rbee-keeper``."""

import signal


def main() -> None:
    """Run `rbee-keeper` and exit."""
    # Until the command takes its signals itself there is nothing to clean up, and Ctrl+C simply
    # ends it: a KeyboardInterrupt that meets one of the import system's callbacks would be lost.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rbee.keeper.app import main

    main()


if __name__ == "__main__":
    main()
