"""Loads and shards a model: arguments are a config and the file to save each process's findings to, as NAME.RANK."""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mm_agrae import config as configs
from mm_agrae.model.compat import prepare
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.parallel.processes import Processes


def own_megabytes() -> float:
    """Memory that is shared with neither files nor other processes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def watch(peak: list[float], done: threading.Event) -> None:
    while not done.is_set():
        peak[0] = max(peak[0], own_megabytes())
        time.sleep(0.002)


if __name__ == "__main__":
    prepare()
    torch.set_num_threads(1)
    config = configs.load(sys.argv[1])
    processes = Processes(config)
    processing = Processing(config.model.path, config.prompt)
    peak, done = [before := own_megabytes()], threading.Event()
    watching = threading.Thread(target=watch, args=(peak, done))
    watching.start()
    policy = Policy(config.model, processing, shared_prompt="auto", device=processes.loading_device)
    policy.distribute(lambda: processes.barrier("sharding"), processes.strategy.shard)
    done.set()
    watching.join()
    with policy.gathered():
        found = policy.hf.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).state_dict()
    weights = sum(tensor.numel() for tensor in policy.hf.parameters()) * 4 / 2**20
    result = {
        "grown": (peak[0] - before) / weights,
        "different": [name for name in loaded.keys() | found.keys() if not torch.equal(loaded[name], found[name])],
        "repeats_because": policy.repeats_because,
        "tied": dict(policy.hf.all_tied_weights_keys),
    }
    Path(f"{sys.argv[2]}.{processes.rank}").write_text(json.dumps(result))
    processes.close()
