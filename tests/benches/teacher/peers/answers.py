"""How a peer answers the bench: a JSON object a line asks, a JSON object a line answers.

The first line is `{"ready": {...}}`, or `{"error": "why this peer cannot run here"}`. Then each request
names its work and brings its token ids, so that all sides compute on the same ones.
"""

import argparse
import json
import os
import sys
import time


def serve(load):
    """`load(model, dtype, threads)` gives what the peer says of itself and a function for each work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("threads", type=int)
    asked = parser.parse_args()

    # Libraries print where they like; only answers may reach the bench.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer):
        answers.write(json.dumps(answer) + "\n")

    try:
        about, works = load(asked.model, asked.dtype, asked.threads)
    except Exception as error:  # whatever it is, the bench goes on without this peer and says why
        say({"error": told(error)})
        raise
    say({"ready": about})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            forget_peak()
            before_mb = status_mb("VmRSS:")
            started = time.perf_counter()
            tokens = works[request["work"]](request)
            seconds = time.perf_counter() - started
        except Exception as error:
            say({"error": told(error)})
            raise
        say({"tokens": tokens, "seconds": seconds, "before_mb": before_mb, "peak_mb": status_mb("VmHWM:")})


def forget_peak():
    """From here on the highest resident size counts; Linux only."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status_mb(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1000 for line in file if line.startswith(field))


def told(error):
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"
