"""Three simulated nodes with two GPUs each: one is lost in mid-run, and the output is that of one process."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clifflab.bench.exactly_once import check_results, read_planted
from clifflab.cli import cli as commands
from clifflab.config import PromptSet, RuntimeConfig, ScoreConfig
from clifflab.runtime.score import score
from clifflab.runtime.score_pool import InlinePool, RayPool
from clifflab.scoring.job import Job
from tests.chaos import contents
from tests.score_files import PLANTED, write_probes

NODES, GPUS = 3, 2
STORE = 100 << 20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes on this machine, the driver on the first; Ray finds a lost one within seconds."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    checks = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }
    size = {"num_cpus": 2, "num_gpus": GPUS, "object_store_memory": STORE, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={**size, "_system_config": checks})
    try:
        for _ in range(NODES - 1):
            found.add_node(**size)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


class Watch:
    """Progress that ends a node abruptly when it has done some blocks."""

    def __init__(self, cluster: Any = None, after: int = 0) -> None:
        self._cluster, self._after = cluster, after
        self.nodes: Counter[str] = Counter()
        self.lost = ""

    def note(self, text: str) -> None:
        pass

    def begin(self, total: int) -> None:
        pass

    def work(self) -> None:
        pass

    def end(self) -> None:
        pass

    def add(self, receipt: dict[str, Any]) -> None:
        self.nodes[receipt.get("node", "")] += 1
        if self._cluster is None or self.lost:
            return
        for node in list(self._cluster.worker_nodes):
            if self.nodes[node.node_id] >= self._after:
                self.lost = node.node_id
                self._cluster.remove_node(node, allow_graceful=False)
                return


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPUs are simulated")
def test_a_node_is_lost(cluster: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    # A prepared block is larger than what Ray sends along with a task: it lies in the store of the node that made it.
    rows, block = int(os.environ.get("CLIFFLAB_CLUSTER_ROWS", "4000")), 150
    corpus = tmp_path / "corpus.jsonl"
    args = ["organism", "corpus", "--rows", str(rows), "--malformed", "0.02", "--out", str(corpus)]
    made = CliRunner().invoke(commands, args)
    assert made.exit_code == 0, made.output
    probes = write_probes(tmp_path / "probes") / "probes.safetensors"
    job = Job(
        model=PLANTED,
        probes=(str(probes),),
        input=str(corpus),
        rows=PromptSet(name="corpus", path=str(corpus), label="unlabelled", existing=True),
        settings=ScoreConfig(block_rows=block),
    )
    settings, watch = RuntimeConfig(), Watch(cluster, after=1)
    with RayPool(settings) as pool:
        found = score(job, tmp_path / "scores", pool.start, watch)
    assert watch.lost
    assert watch.nodes.total() == -(-rows // block)
    assert set(watch.nodes) - {watch.lost}, "the others went on"
    check_results(found.root, corpus, read_planted(corpus))
    one = score(job, tmp_path / "one", lambda: InlinePool(settings), Watch())
    assert contents(found.root) == contents(one.root)
