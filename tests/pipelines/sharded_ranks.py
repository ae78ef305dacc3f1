"""Single ranks of the sharded trainings. They import this module, so it must not import Ray or MLflow."""

import json

import torch
from plain_training import Record, timeless, trainer_for
from tolerances import one_by_one

from kernels.newton_schulz import newton_schulz
from model.distributed.dtensor import is_sharded, to_local
from model.optim import muon_adamw
from pipelines.recipe.loading import recipe_from_dict, with_overrides

AT = "2"
"""Step of the checkpoint that other runs resume from: within a warm-up, before everything is trained again."""
SHARDED = {"train.sharding": "fsdp"}
PLAIN = {"train.accumulation_steps": 1, "train.grad_clip": 1e6}
"""Settings with a fixed order of gradient sums and without gradient clipping."""
NARROW = {**PLAIN, "train.autocast": "bfloat16", "model.qat": False}
ROLLED_BACK = {
    **PLAIN, "train.stages": [{"attention": "sparse", "steps": 2}, {"attention": "indexer_warmup", "steps": 2}],
    "train.stability.action": "roll_back", "train.stability.anticipatory_routing": {"lag": 1, "steps": 2},
    "train.checkpoint_every": 4, "train.recompute": True,
}  # fmt: skip
"""A rollback from a warm-up, whose passes have no backward pass through the layers, to other weights."""
BOTH_WAYS = {"clipped": {}, "plain": PLAIN, "narrow": NARROW, "rolled-back": ROLLED_BACK}


def trained(recipe, folder, rank=0, world=1, source=None):
    record = Record(folder)
    trainer = trainer_for(recipe, record, rank, world)
    if source is not None:
        torch.rand(3)  # move the generator
        trainer.load_checkpoint(source)
        (folder / "loaded").mkdir(parents=True, exist_ok=True)
        trainer.snapshot().write(folder / "loaded")
    if recipe.train.stability.action == "roll_back":  # one rollback, from step 3 to the start
        spikes = trainer.spikes
        spikes._find_reason = lambda *_: "a spike" if trainer.step == 3 and not spikes.interventions else None
    trainer.run()
    if rank == 0:
        (folder / "record.json").write_text(json.dumps([timeless(record.logged), record.reported]))
    return trainer.model


def two_ranks(rank, world, recipe, folder):
    muon_adamw.newton_schulz = one_by_one(newton_schulz)  # batches of sharded expert stacks differ from replicated ones
    recipe = with_overrides(recipe_from_dict(recipe), {"train.workers": world})
    for name, changes in BOTH_WAYS.items():
        whole = trained(with_overrides(recipe, changes), folder / f"{name}-replicas", rank, world)
        shards = trained(with_overrides(recipe, {**changes, **SHARDED}), folder / f"{name}-shards", rank, world)
        assert not any(map(is_sharded, whole.parameters()))
        numbers = [sum(to_local(p).numel() for p in model.parameters()) for model in (shards, whole)]
        assert numbers[0] < 0.8 * numbers[1]
    sharded = with_overrides(recipe, SHARDED)
    trained(sharded, folder / "resumed", rank, world, folder / "clipped-shards" / AT)
    trained(sharded, folder / "two-from-one", rank, world, folder / "one" / AT)


def three_ranks(rank, world, recipe, folder):
    recipe = with_overrides(recipe_from_dict(recipe), {"train.workers": world, **SHARDED})
    model = trained(recipe, folder / "three-from-two", rank, world, folder / "clipped-shards" / AT)
    if rank == world - 1:  # some parameters have fewer rows than ranks, so the last rank holds none of them
        assert any(len(to_local(p)) == 0 for p in model.parameters())


def latent_ranks(rank, world, recipe, folder):
    muon_adamw.newton_schulz = one_by_one(newton_schulz)
    recipe = with_overrides(recipe_from_dict(recipe), {"train.workers": world, **PLAIN})
    trained(recipe, folder / "replicas", rank, world)
    model = trained(with_overrides(recipe, SHARDED), folder / "shards", rank, world)
    assert is_sharded(model.layers[0].attn.wkv_b.weight)
