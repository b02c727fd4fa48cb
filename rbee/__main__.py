"""``python -m rbee`` is ``rbee-keeper``."""

from rbee.keeper.app import main

if __name__ == "__main__":
    main()
