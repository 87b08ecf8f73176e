"""One of two JAX processes that share a folder of checkpoints; test_checkpoint.py starts both.

It restores what one process saved, of which the second process can't read the newest step, saves
that step again, and says what it saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from checkpoint_states import like, values_of

from kdjax.storage import restore
from kdjax.storage.checkpoints import open_checkpoints
from kdjax.storage.fingerprint import fingerprints


def main(process: int, port: str, folder: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    wanted = like(jax.device_count())
    whole = values_of(3)

    def dealt(values, leaf):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: values[at])

    state, read_arrays = jax.tree.map(dealt, whole, wanted), restore.read_arrays

    def broken(place, item):
        if process == 1 and place.parent.name == "3":
            raise OSError("a disk of this process")
        return read_arrays(place, item)

    checkpoints = open_checkpoints(folder)
    restore.read_arrays = broken
    _, about = checkpoints.newest(wanted, lambda about: None)
    restore.read_arrays = read_arrays
    checkpoints.save(3, state, {"position": 33})
    checkpoints.close()
    again, newer = checkpoints.newest(wanted, lambda about: None)
    same = all(
        np.array_equal(shard.data, values[shard.index])
        for values, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True)
        for shard in leaf.addressable_shards
    )
    seen = [about["step"], newer["position"], same, fingerprints(state) == fingerprints(again)]
    print("SAW " + json.dumps([jax.process_count(), jax.device_count(), *seen]))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
