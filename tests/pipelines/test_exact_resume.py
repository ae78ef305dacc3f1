"""A run killed at any moment and restarted is bit-exactly equal to one never killed."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from model.errors import CheckpointError
from pipelines.__main__ import INTERRUPTED
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.ray_runtime.checkpoint_index import INDEX
from pipelines.ray_runtime.fit import RAY_RUN
from pipelines.recipe.loading import with_overrides
from pipelines.steps import train
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking
from pipelines.tracking.run_folder import RUN_FILE
from pipelines.training.build import build_trainer

STAGES = [
    {"attention": "dense", "steps": 10, "qat": False},
    {"attention": "indexer_warmup", "steps": 4},
    {"attention": "sparse", "steps": 26, "sequence_length": 64},
]
STEPS = 40


def recipe_named(prepared, name, sharding="none"):
    return with_overrides(
        prepared,
        {"run.name": name, "train.workers": 2, "train.stages": STAGES, "train.checkpoint_every": 4,
         "train.validate_every": 10, "train.log_every": 1, "train.stability.spike": None, "train.sharding": sharding},
    )  # fmt: skip


def run_id(recipe):
    return json.loads((recipe.run_folder / RUN_FILE).read_text())["run_id"]


def history(recipe):
    """Return (step, loss) as logged, in order."""
    points = open_tracking(recipe).client.get_metric_history(run_id(recipe), "train/loss")
    return [(point.step, point.value) for point in sorted(points, key=lambda p: (p.timestamp, p.step))]


def outcome(recipe):
    """Return all logged losses of a run by step, and the hash of its final weights."""
    losses = {}
    for step, loss in history(recipe):
        losses.setdefault(step, set()).add(loss)
    return losses, hashlib.sha256((recipe.final_checkpoint / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(prepared, ray_cluster):
    recipe = recipe_named(prepared, "straight")
    with slow_tracking() as recorded, watching(recipe, recorded) as early:
        train.run(recipe)
    return *outcome(recipe), early


@pytest.fixture(scope="module")
def straight_shards(prepared, ray_cluster):
    recipe = recipe_named(prepared, "straight-shards", sharding="fsdp")
    train.run(recipe)
    return outcome(recipe)


@contextmanager
def slow_tracking():
    """Delay logging to MLflow; yield the list of logged steps."""
    recorded, log = [], TrackedRun.log_metrics

    def slow(self, metrics, step=None):
        time.sleep(0.1)
        log(self, metrics, step)
        if "train/loss" in metrics:
            recorded.append(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrackedRun, "log_metrics", slow)
        yield recorded


@contextmanager
def watching(recipe, recorded):
    """Yield {step of a checkpoint in the index: last step logged when it appeared}."""
    seen, done = {}, threading.Event()

    def watch():
        while not done.wait(0.01):
            for step in indexed_steps(recipe) - set(seen):
                seen[step] = recorded[-1]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def test_a_checkpoint_is_indexed_only_after_earlier_metrics_are_logged(straight):
    early = straight[2]
    assert len(early) >= 3 and all(recorded >= step for step, recorded in early.items()), early


ENDED = """
import os, signal, time
from pipelines.ray_runtime.session import ray_session
with ray_session():
    for ctrl_c in (signal.default_int_handler, signal.SIG_IGN):  # in the foreground, and in the background of a script
        signal.signal(signal.SIGINT, ctrl_c)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            print("interrupted")
"""


def test_sigterm_acts_like_ctrl_c():
    """In its own process, since libraries used by other tests leave signal handlers installed."""
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.split() == ["interrupted"] * 2, ended


def processes_below(pid, name):
    """Return the descendants of a process with ``name`` in their command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def indexed_steps(recipe):
    """Return the steps of the checkpoints in a run's index."""
    path = recipe.run_folder / RAY_RUN / INDEX
    return {int(n) for n in re.findall(r"step_(\d{6})", path.read_text())} if path.exists() else set()


def wait_for_checkpoint(recipe, step, process=None):
    """Wait until the index lists a checkpoint of ``step`` or later."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        if max(indexed_steps(recipe), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} was written")


def check(recipe, straight):
    losses, weights = outcome(recipe)
    assert losses == straight[0] and set(losses) == set(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in losses.values())
    assert weights == straight[1]
    assert len(history(recipe)) == STEPS  # repeated steps are logged once
    tags = open_tracking(recipe).client.get_run(run_id(recipe)).data.tags
    resumed = [
        int(tag.removeprefix("event.")) for tag, text in tags.items() if "resumed from the last checkpoint" in text
    ]
    # From checkpoints: every fourth step, and the end of a stage.
    assert resumed and all(step % 4 == 0 or step in (10, 14) for step in resumed)


def test_a_full_disk_keeps_the_last_checkpoint_and_names_it(prepared, ray_cluster):
    """Simulate a full disk after two checkpoints by limiting the workers' file size."""
    recipe = with_overrides(
        prepared,
        {"run.name": "full-disk", "train.max_failures": 0, "train.checkpoint_every": 1,
         "train.stages": [{"attention": "dense", "steps": 200}]},
    )  # fmt: skip

    def fill():
        wait_for_checkpoint(recipe, 2)
        for worker in processes_below(os.getpid(), "RayTrainWorker"):
            worker.rlimit(psutil.RLIMIT_FSIZE, (40_000, psutil.RLIM_INFINITY))

    filler = threading.Thread(target=fill)
    filler.start()
    with pytest.raises(CheckpointError) as caught:
        train.run(recipe)
    filler.join()
    message = r"checkpoint of step (\d+): cannot be written \(.*File too large.*\); the last one written is (step_\d+)"
    failed, last = re.fullmatch(message, str(caught.value)).groups()
    step = int(last.removeprefix("step_"))
    assert 2 <= step < int(failed) and max(indexed_steps(recipe)) == step
    assert open_tracking(recipe).client.get_run(run_id(recipe)).info.status == "FAILED"
    (folder,) = recipe.run_folder.glob(f"train/**/{last}")
    trainer = build_trainer(check_prepared(recipe, read_manifest(recipe.data_folder)), None, None)
    trainer.load_checkpoint(folder)
    assert trainer.step == step


@pytest.mark.long
@pytest.mark.parametrize(("sharding", "unbroken"), [("none", "straight"), ("fsdp", "straight_shards")])
def test_a_killed_worker_is_replaced_bit_exactly(prepared, ray_cluster, request, sharding, unbroken):
    recipe = recipe_named(prepared, f"worker-killed-{sharding}", sharding)
    expected = request.getfixturevalue(unbroken)
    killed = []

    def kill():
        wait_for_checkpoint(recipe, random.choice((4, 12, 20)))
        time.sleep(random.random() / 5)
        worker = random.choice(processes_below(os.getpid(), "RayTrainWorker"))
        killed.append(worker.pid)
        worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    train.run(recipe)
    killer.join()
    assert killed
    check(recipe, expected)


@pytest.mark.timeout(900)  # starts Ray and its workers three times
@pytest.mark.parametrize(
    "starts", [[["worker", "raylet"], ["driver"]], pytest.param([["asked to end"]], marks=pytest.mark.long)]
)
def test_a_killed_run_resumes_bit_exactly(prepared, ray_cluster, straight, tmp_path, capsys, starts):
    """Start a run in its own process, kill it at random steps, and restart it."""
    recipe = recipe_named(prepared, starts[0][0].replace(" ", "-"))
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps(recipe.to_dict()))
    for victims in starts:
        with begun(config, slowly="asked to end" not in victims) as driver:
            for victim in victims:
                step = max(indexed_steps(recipe), default=0) + random.choice((4, 8))
                wait_for_checkpoint(recipe, step, driver)
                time.sleep(random.random() / 4)
                assert driver.poll() is None, "it ended before it could be killed"
                VICTIMS[victim](driver, recipe)
    if starts[-1] == ["driver"]:  # as if killed during a write
        checkpoints = recipe.run_folder / RAY_RUN / INDEX
        os.truncate(checkpoints, checkpoints.stat().st_size // 2)
    train.run(recipe)
    assert ("repaired the checkpoint index" in capsys.readouterr().out) == (starts[-1] == ["driver"])
    check(recipe, straight)


SLOWLY = """
import sys, time
from pipelines import __main__ as cli
from pipelines.tracking.mlflow_store import TrackedRun
log = TrackedRun.log_metrics
def slow(*arguments):
    time.sleep(1.0)
    log(*arguments)
TrackedRun.log_metrics = slow
sys.exit(cli.main(sys.argv[1:]))
"""
"""A run whose checkpoints wait long for slow metrics. Workers outlive their raylet by seconds, or longer on a busy
machine, and must not reach the end of the run."""


@contextmanager
def begun(config, slowly):
    """Start or resume a run in a process session of its own; kill the whole session afterwards."""
    command = [sys.executable, *(("-c", SLOWLY) if slowly else ("-m", "pipelines")), "train", "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == driver.pid:
                    process.kill()


def kill_worker(driver, recipe):
    random.choice(processes_below(driver.pid, "RayTrainWorker")).kill()


def kill_raylet(driver, recipe):
    raylets = []
    for process in processes_below(driver.pid, "raylet/raylet"):
        with suppress(psutil.NoSuchProcess):
            if Path(process.exe()).name == "raylet":  # or a worker that it has forked and that runs nothing else yet
                raylets.append(process)
    assert raylets
    for raylet in raylets:
        with suppress(psutil.NoSuchProcess):
            raylet.kill()
    assert driver.wait() != 0


def kill_driver(driver, recipe):
    driver.kill()
    driver.wait()


def ask_to_end(driver, recipe):
    below = processes_below(driver.pid, "")
    driver.terminate()
    assert driver.wait() == INTERRUPTED
    assert open_tracking(recipe).client.get_run(run_id(recipe)).info.status == "KILLED"
    assert not psutil.wait_procs(below, timeout=300)[1]


VICTIMS = {"worker": kill_worker, "raylet": kill_raylet, "driver": kill_driver, "asked to end": ask_to_end}
