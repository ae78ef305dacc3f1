"""The losses of a shortened tiny recipe, step by step, against golden values.

A change that must not alter training leaves them unchanged. A change that is meant to alter it regenerates them with
``make golden``, which prints by how much they moved, for the commit message. The command also measures the tolerances:
how far the losses diverge when weights are perturbed after every step by the rounding error of another CPU.
"""

import hashlib
import itertools
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from model.optim import MuonAdamW
from model.transformer import Transformer
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.steps import prepare
from pipelines.training.build import build_trainer, folder_batches

FILE = Path(__file__).parent / "golden" / "tiny.json"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
METRICS = ("train/loss", "train/mtp_loss", "train/indexer_kl", "train/balance", "train/grad_norm")
STAGES = [
    {"attention": "dense", "steps": 5, "qat": False},
    {"attention": "indexer_warmup", "steps": 1},
    {"attention": "sparse", "steps": 4},
]
CHANGES = {
    "data.max_text_bytes": None, "data.validation_share": 0.2, "data.retrieval_validation_documents": 16,
    "data.retrieval_lengths": [112, 256], "data.pairs": 3, "data.rounds": 2,  # several documents per row
    "train.workers": 1, "train.batch_rows": 4, "train.stages": STAGES, "train.warmup_steps": 3,
    "train.validation_rows": 4, "train.log_every": 1, "train.validate_every": 100,
    # Not auto, so that the values hold on every processor; and not bfloat16, in which processors differ by more than a
    # bug does within a few steps.
    "train.autocast": "none", "train.optimizer.ns_dtype": "float32",
    # Also cover losses with little or no weight in the recipe.
    "model.mtp_layers": 1, "train.context_loss_weight": 0.5, "train.balance_loss_weight": 0.1,
    "train.router_bias_speed": 0.05,
}  # fmt: skip
"""Changes that shorten the recipe and make the losses cover all of the training loop."""
PERTURBATION, DRAWS, MARGIN = 2**-16, 4, 4
"""Relative perturbation of the weights, number of draws, and tolerance as a multiple of the divergence."""


class _Losses:
    def __init__(self):
        self.steps = {name: [] for name in METRICS}

    def log(self, step, metrics):
        for name in METRICS:
            if name in metrics:  # a warm-up has no multi-token loss
                self.steps[name].append(metrics[name])

    def log_event(self, step, message):
        raise AssertionError(message)

    def report(self, step, metrics, write):
        pass


def prepared_tiny(folder):
    """Return the shortened recipe with prepared text, equal on every machine."""
    draw = random.Random(0)
    words = [f"{first}{rest}" for first in ("r", "st", "l", "g") for rest in ("iver", "one", "amp", "arden")]
    texts = [" ".join(words[int(draw.random() * len(words))] for _ in range(10 * i)) for i in range(2, 26)]
    # One file, since the order of several depends on their paths.
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = load_recipe([TINY], [f"data.sources=[{folder}/text.jsonl]", f"run.folder={folder}"])
    recipe = with_overrides(recipe, CHANGES)
    manifest = prepare.run(recipe).manifest
    return recipe.model_copy(update={"model": recipe.model.replace(vocab_size=manifest.vocab_size)})


def trained(recipe, disturbed=None):
    """Return the losses of a run by step, and a hash of the first batch of each stage."""
    torch.set_num_threads(1)
    read, open_folder, losses = hashlib.sha256(), folder_batches(recipe), _Losses()

    def open_batches(stage, epoch, skip):
        batches = open_folder(stage, epoch, skip)
        for name, values in batches.peek(1)[0].items():
            read.update(name.encode() + values.numpy().tobytes())
        return batches

    trainer = build_trainer(recipe, open_batches, losses)
    if disturbed is not None:
        noise = torch.Generator().manual_seed(disturbed)

        @torch.no_grad()
        def disturb(optimizer, arguments, more):
            for p in trainer.model.parameters():
                p.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=noise))

        trainer.optimizer.register_step_post_hook(disturb)
    trainer.run()
    return {"losses": losses.steps, "data": read.hexdigest()}


def apart(one, two):
    """Return relative differences by metric and step."""
    return {
        name: [abs(a - b) / abs(b) for a, b in zip(one["losses"][name], values, strict=True)]
        for name, values in two["losses"].items()
    }


def beyond(found, golden):
    """Return (relative difference, tolerance) of the first step out of tolerance, by metric."""
    off = {}
    for name, differences in apart(found, golden).items():
        for far, allowed in zip(differences, golden["tolerance"][name], strict=True):
            if not far <= allowed:
                off.setdefault(name, (far, allowed))
    return off


def test_losses_match_the_golden_values(tmp_path):
    golden = json.loads(FILE.read_text())
    found = trained(prepared_tiny(tmp_path))
    assert found["data"] == golden["data"], "another text is read, so the losses cannot be compared"
    assert not beyond(found, golden), (
        f"on file are losses of torch {golden['torch']}, this is {torch.__version__}; if they are meant to change: "
        "make golden"
    )


def nesterov_off(patch):
    step = MuonAdamW._muon_batch

    def heavy_ball(self, batch, *others):
        for _, gradient, momentum in batch:
            momentum.mul_(self.config.momentum).add_(gradient)
        # With zero initial momentum, Nesterov's is a multiple, which orthogonalization cancels.
        step(self, [(weight, momentum, torch.zeros_like(momentum)) for weight, _, momentum in batch], *others)

    patch.setattr(MuonAdamW, "_muon_batch", heavy_ball)


def documents_unmasked(patch):
    forward = Transformer.forward

    def whole_rows(self, tokens, **options):
        return forward(self, tokens, **options | {"positions": None})

    patch.setattr(Transformer, "forward", whole_rows)


@pytest.mark.long
@pytest.mark.parametrize(
    "bug",
    [
        {"train.answer_loss_weight": 1.0}, {"train.context_loss_weight": 1.0}, {"train.mtp_loss_weight": 0.1},
        {"train.balance_loss_weight": 0.0}, {"train.indexer_loss_weight": 2.0}, {"train.router_bias_speed": 0.0},
        {"train.grad_clip": 1e9}, {"train.warmup_steps": 2}, {"train.decay_share": 0.0},
        {"train.optimizer.momentum": 0.9}, {"train.optimizer.weight_decay": 0.0}, {"train.optimizer.rms": 0.2},
        {"train.optimizer.betas": [0.9, 0.99]}, {"model.qat": False}, {"model.window": 15}, {"run.seed": 1},
        nesterov_off, documents_unmasked,
    ],
    ids=lambda bug: bug.__name__ if callable(bug) else next(iter(bug)),
)  # fmt: skip
def test_a_bug_shows(tmp_path, monkeypatch, bug):
    """Also if the loop ignores a setting."""
    recipe = prepared_tiny(tmp_path)
    if callable(bug):
        bug(monkeypatch)
    else:
        recipe = with_overrides(recipe, bug)
    assert beyond(trained(recipe), json.loads(FILE.read_text()))


def regenerate():
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepared_tiny(Path(folder))
        golden = trained(recipe)
        disturbed = [apart(trained(recipe, seed), golden) for seed in range(DRAWS)]
    golden["tolerance"] = {}
    for name in METRICS:
        # Divergence persists in later steps.
        farthest = itertools.accumulate((max(at) for at in zip(*(far[name] for far in disturbed))), max)
        golden["tolerance"][name] = [float(f"{MARGIN * max(far, PERTURBATION):.1e}") for far in farthest]
    golden["torch"] = torch.__version__
    if FILE.exists():
        moved = apart(golden, json.loads(FILE.read_text()))
        print("moved, relatively, by at most", {name: f"{max(differences):.1e}" for name, differences in moved.items()})
    text = json.dumps(golden, indent=1)
    # One metric per line.
    FILE.write_text(re.sub(r"\n {3,}", " ", text).replace("[ ", "[").replace("\n  ]", "]") + "\n")


if __name__ == "__main__":
    sys.exit(regenerate())
