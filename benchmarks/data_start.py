"""A process that starts on a corpus, reads its first batch and says how long that took; run by `benchmarks.data`."""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: Path, began: float) -> None:
    importing = time.time()
    import torch  # noqa: F401  what it costs is not ours, and is left out

    torch_seconds = time.time() - importing
    from benchmarks.data_start_config import config_of
    from nemotron_train.data.batch import RankShare
    from nemotron_train.data.loader import DataLoader
    from nemotron_train.data.run_data import open_run_data

    before = memory_mib()
    data = open_run_data(config_of(folder))
    with DataLoader(data.reader, RankShare(0, 1, 1), lambda consumed: 64) as loader:
        next(loader)
        seconds = time.time() - began - torch_seconds
        for _ in range(2000):
            next(loader)
    print(json.dumps({"seconds": seconds, "torch_seconds": torch_seconds, "memory_mib": memory_mib() - before}))


def memory_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(os.environ["BEGAN"]))
