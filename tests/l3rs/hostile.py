"""Loads every folder below the first argument, as a user would, and prints the outcomes as a JSON object.

It runs in a process of its own, so that its CPU time and memory can be measured and a hang can be ended.
"""

import json
import resource
import sys
import time
from pathlib import Path

import l3rs


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


for folder in sorted(Path(sys.argv[1]).iterdir()):
    before, start = peak_megabytes(), time.process_time()
    try:
        l3rs.restore(folder)
        said, kind = "", "loaded"
    except BaseException as error:
        said, kind = str(error), type(error).__name__
    seconds, megabytes = time.process_time() - start, peak_megabytes() - before
    outcome = {"kind": kind, "said": said, "seconds": seconds, "megabytes": megabytes}
    print(json.dumps({folder.name: outcome}), flush=True)
