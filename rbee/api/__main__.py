"""``python -m rbee.api queen|hive|worker``: print the OpenAPI document of a daemon."""

from __future__ import annotations

import json
import sys

from rbee.api.documents import DAEMONS, document_of


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in DAEMONS:
        sys.stderr.write(f"usage: python -m rbee.api {'|'.join(DAEMONS)}\n")
        return 2
    sys.stdout.write(json.dumps(document_of(sys.argv[1]), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
