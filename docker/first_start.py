"""Before the first start of the box: the endpoint listens to more than its own container, so it needs an API key.

Where none is given as a secret and none is stored, one is made. It stands in HOMESTILL_HOME/first-key, readable
by the container's user alone, and in no log; whoever has noted it may delete the file.
"""

import os
import sys
from pathlib import Path

from serve.guard.keys import Keys, add

NAME = "first"


def first_key(home: Path, given: bool) -> str:
    """Make a key if there is none; what there is to say about it."""
    if given or Keys((), home / "keys.json").required:
        return "API keys: there are some"
    key = add(home / "keys.json", NAME, tasks=None, egress="allow", daily_usd=None)
    file = home / "first-key"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(f"{key}\n")
    return f"API keys: made the first one; read it with: docker compose exec serve cat {file}"


if __name__ == "__main__":
    found = first_key(Path(os.environ["HOMESTILL_HOME"]), bool(os.environ.get("HOMESTILL_API_KEYS")))
    sys.stdout.write(f"{found}\n")
