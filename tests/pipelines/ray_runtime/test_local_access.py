"""Who can reach a local cluster: its addresses, and calls without its token."""

import json
import os
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import ray
import ray.train
from listening_sockets import listeners, process_tree
from ray.train.torch import TorchTrainer

from pipelines.ray_runtime.cluster_token import VARIABLE
from pipelines.ray_runtime.process_group import torch_config


def test_a_local_cluster_listens_on_loopback_only(ray_cluster):
    ray.get(ray.remote(lambda: None).remote())  # there is a worker
    found = listeners(process_tree())
    assert [listener for listener in found if not listener.is_loopback] == []
    processes = " ".join(listener.process for listener in found)
    for name in ("gcs_server", "raylet", "dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE"):
        assert name in processes


def test_a_local_cluster_refuses_calls_without_its_token(ray_cluster):
    request = b"\x0a\x01x\x12\x01x"  # a namespace and a key
    key = {"authorization": f"Bearer {os.environ[VARIABLE]}"}
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        get = channel.unary_unary("/ray.rpc.InternalKVGcsService/InternalKVGet")
        with pytest.raises(grpc.RpcError) as refusal:
            get(request)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert get(request, metadata=tuple(key.items()))
    jobs = f"http://{ray._private.worker._global_node.webui_url}/api/jobs/"
    assert httpx.get(jobs, trust_env=False, timeout=60).status_code == 401
    assert httpx.get(jobs, trust_env=False, timeout=60, headers=key).status_code == 200


def test_the_token_is_in_the_environment_only(ray_cluster):
    token = os.environ[VARIABLE]
    inherited = ray.get(ray.remote(lambda: os.environ[VARIABLE]).remote())
    assert inherited == token
    assert not any(token in argument for process in process_tree() for argument in process.cmdline())
    session = ray._private.worker._global_node.get_session_dir_path()
    files = [path for path in Path(session).rglob("*") if path.is_file()]
    assert "raylet.out" in {path.name for path in files}
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_ranks_listen_on_loopback_only(ray_cluster, tmp_path):
    outcome = tmp_path / "outcome.json"

    def train_function():
        import torch.distributed as dist

        sockets = psutil.Process().net_connections("inet")
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, [c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN])
        if dist.get_rank() == 0:  # Ray keeps metrics with checkpoints only
            outcome.write_text(json.dumps({"backend": dist.get_backend(), "found": found}))

    trainer = TorchTrainer(
        train_function,
        torch_config=torch_config(),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="ports", storage_path=str(tmp_path)),
    )
    trainer.fit()
    ranks = json.loads(outcome.read_text())
    first, second = ranks["found"]
    assert ranks["backend"] == "gloo" and len(first) > len(second) > 0  # rank 0 also serves the store
    assert {ip.removeprefix("::ffff:") for ip in first + second} == {"127.0.0.1"}
