"""The endpoint answers on its port. Whether its local model is up does not count: the teacher stands in."""

import sys
import urllib.request

with urllib.request.urlopen("http://127.0.0.1:8000/healthz", timeout=4) as answer:
    sys.exit(answer.status != 200)
