"""A part of `bench.gpu` for tests. Its measurements need no GPU and no library."""

import os
import signal
import time

TITLE = "a part for tests"
LIMIT = 6
ITEMS = {"counts": (), "needs": ("no-such-package", "pytest"), "dies": (), "sleeps": (), "late": ()}
IMPORTS = ()


def measure(item, tiny, folder):
    counter = folder / "counter"
    if item == "counts":
        counter.write_text(str(int(counter.read_text()) + 1 if counter.exists() else 1))
        return {"times": int(counter.read_text())}
    if item == "dies":
        print("no memory left", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "sleeps":
        time.sleep(600)
    return {}


def goals(done):
    return {"counted": {"goal": 1, "found": done["counts"]["times"], "met": True}} if "counts" in done else {}
