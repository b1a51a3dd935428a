"""The server on a cluster of two nodes, all on this machine, while clients ask.

    python examples/ray_serve.py [MODEL]

It begins with one replica and gets a second as requests wait. Then a replica is killed, and a node: clients ask again,
and every answer has the tokens that `runtime.generate` gives it alone.
"""

import argparse
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

import runtime
import runtime.ray

LOADING = {"max_batch": 4, "max_seq_len": 128}
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}  # room for one replica
QUICK = {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}  # to notice that a node is gone
CLIENTS = 8


def running() -> int:
    """How many replicas take requests."""
    found = serve.status().applications["default"].deployments["gemma-runtime"].replica_states
    return found.get("RUNNING", 0)


def wait_for(what: str, holds: Callable[[], bool], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, f"{what}: not within {seconds} seconds"
        time.sleep(0.1)
    print(what, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    model = parser.parse_args().model

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "_system_config": QUICK, "include_dashboard": False}
    )
    node = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    deployment = runtime.ray.deployment(model, LOADING, model_id="gemma", replicas=(1, 2))
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "upscale_delay_s": 1}
    serve.run(deployment.options(autoscaling_config=scaling).bind())  # sooner than after half a minute
    client = openai.OpenAI(base_url="http://127.0.0.1:8123/v1", api_key="none", max_retries=20)
    done = threading.Event()
    numbers = itertools.count()

    def ask_on() -> list[tuple[str, int, list[int]]]:
        answers = []
        while not done.is_set():
            seed = next(numbers)
            prompt = f"The dog {seed % 50} is"
            answer = client.completions.create(
                model="gemma",
                prompt=prompt,
                max_tokens=48,
                temperature=seed % 2,
                seed=seed,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            answers.append((prompt, seed, answer.choices[0].token_ids))
        return answers

    def replicas() -> list[psutil.Process]:
        return [one for one in psutil.Process().children(recursive=True) if "ServeReplica" in one.cmdline()[0]]

    with ThreadPoolExecutor(CLIENTS) as clients:
        asking = [clients.submit(ask_on) for _ in range(CLIENTS)]
        try:
            wait_for("a second replica came, since requests waited", lambda: running() == 2)
            killed = replicas()[0]
            killed.kill()
            wait_for("one replica killed", lambda: running() == 1)
            wait_for("another one came in its place", lambda: running() == 2)
            cluster.remove_node(node, allow_graceful=False)
            wait_for("a node lost, and the replica on it", lambda: running() == 1)
            time.sleep(1)
        finally:
            done.set()
        answers = [answer for one in asking for answer in one.result()]

    with runtime.load(model, **LOADING) as alone:
        for prompt, seed, ids in answers:
            options = {"max_new_tokens": 48, "ignore_eos": True, "temperature": seed % 2, "seed": seed}
            assert ids == list(runtime.generate(alone, prompt, **options).token_ids), (prompt, seed)
    print(f"{len(answers)} questions answered, with the tokens of generate alone")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
