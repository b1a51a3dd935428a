"""A dataset of prompts through two engines on a cluster of two nodes, all on this machine.

    python examples/ray_batch.py [MODEL] [--prompts 64]

The first run stops on the way. The second takes up where it stopped, loses an engine, and then a node with the other;
every prompt is answered once, with the tokens that `runtime.generate` gives it alone.
"""

import argparse
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import ray
import ray.data
from ray.cluster_utils import Cluster
from ray.data.checkpoint import CheckpointConfig

import runtime
import runtime.ray

LOADING = {"max_batch": 4, "max_seq_len": 128}
OPTIONS = {"max_new_tokens": 48, "ignore_eos": True}
NODE = {"num_cpus": 3, "object_store_memory": 100_000_000}
QUICK = {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}  # to notice that a node is gone


class Stopped(Exception):
    """Stands for whatever ends a run before its time."""


def answer(model: str, prompts: Path, answers: Path, stop_at: int | None = None) -> None:
    """A run, which leaves out what runs before it have written. It stops at the prompt `stop_at`."""

    def stop(row: dict) -> dict:
        if row["id"] == stop_at:
            raise Stopped(f"at prompt {stop_at}")
        return row

    processor = runtime.ray.build_processor(
        model,
        LOADING,
        sampling_params=OPTIONS,
        postprocess=stop,
        concurrency=2,
        batch_size=4,
    )
    processor(ray.data.read_parquet(str(prompts))).write_parquet(str(answers))


def rows_of(folder: Path) -> list[dict]:
    """What finished files hold, in the order of their names."""
    files = [file for file in sorted(folder.glob("*.parquet")) if ".pending" not in file.suffixes]
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def engines() -> list[psutil.Process]:
    """The processes of the cluster's engines, each a child of its node's: actors are named after their class."""
    return [process for process in psutil.Process().children(recursive=True) if "Answering" in process.cmdline()[0]]


def lose(cluster: Cluster, node: object, done: Path, before: int, prompts: int) -> None:
    """Takes an engine and then a node away, once the run has begun to write."""
    while len(rows_of(done)) == before or len(engines()) < 2:
        time.sleep(0.01)
    engines()[0].kill()
    cluster.remove_node(node, allow_graceful=False)
    print(f"an engine and a node lost with {prompts - len(rows_of(done))} prompts to go", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "_system_config": QUICK, "include_dashboard": False}
    )
    node = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    with tempfile.TemporaryDirectory() as folder:
        prompts, answers, done = Path(folder, "prompts.parquet"), Path(folder, "answers"), Path(folder, "done")
        rows = [
            {"id": i, "prompt": f"The dog {i} is", "sampling_params": {"temperature": float(i % 2), "seed": i}}
            for i in range(options.prompts)  # every second one is drawn, each with a seed of its own
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), prompts)
        # Ray's own checkpoint: the ids of what has been written. Of several machines all have to see its folder.
        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=str(done), delete_checkpoint_on_success=False
        )
        try:
            answer(options.model, prompts, answers, stop_at=options.prompts // 2)
        except ray.exceptions.RayTaskError as error:
            assert "Stopped" in str(error)
        before = len(rows_of(done))
        print(f"stopped with {before} of {options.prompts} prompts answered", flush=True)
        losing = threading.Thread(target=lose, args=(cluster, node, done, before, options.prompts))
        losing.start()
        answer(options.model, prompts, answers)
        losing.join()
        found = rows_of(answers)

    falls = [before for before, after in pairwise(row["id"] for row in found) if before > after]
    assert len(falls) <= 1, "the files of each run are in the order of the prompts"
    found.sort(key=lambda row: row["id"])
    assert [row["id"] for row in found] == [row["id"] for row in rows], "a prompt was lost, or answered twice"
    with runtime.load(options.model, **LOADING) as model:
        alone = [runtime.generate(model, row["prompt"], **OPTIONS, **row["sampling_params"]) for row in rows]
    assert [row["generated_tokens"] for row in found] == [list(result.token_ids) for result in alone]
    print(f"{len(found)} prompts answered once each, with the tokens of generate alone")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
