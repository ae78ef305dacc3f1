"""Latent attention of transformers beside ours, with equal weights, for tests of single layers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV32Config, KimiLinearConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from model.cache import Cache
from model.config import ModelConfig
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.layers.rope import RotaryFrequencies
from model.mixers import MIXERS
from model.mixers.base import Mixer
from tests.model.networks import EXACT

NAMES = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "indexer": "indexer",
}
"""Our names of transformers' modules."""


@dataclass(frozen=True)
class Case:
    """One configuration of a layer."""

    sizes: dict[str, Any] = field(default_factory=dict)
    """``q_lora_rank``, ``kv_lora_rank``, ``qk_nope_head_dim``, ``qk_rope_head_dim``, ``v_head_dim``."""
    hidden: int = 40
    heads: int = 3
    yarn: dict[str, Any] | None = None
    theta: float = 10_000.0
    index: tuple[int, int, int] | None = None
    """Heads, dims and top-k of the indexer; None for mla."""
    rope: bool = True
    seed: int = 0


SIZES = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


class Pair:
    """A layer of transformers and ours, with equal weights."""

    def __init__(self, case: Case):
        torch.manual_seed(case.seed)
        self.case, self.sizes = case, {**SIZES, **case.sizes}
        self.oracle, self.rotary = self._oracle()
        for name, p in self.oracle.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.normal_(p, std=0.2)
            else:
                nn.init.normal_(p, mean=1.0, std=0.2)
        self.config = self._config()
        self.mixer: Mixer = MIXERS[self.config.layers[0]](self.config, 0).eval()
        self.mixer.load_state_dict({ours(name): p for name, p in self.oracle.state_dict().items()})
        rotary = self.mixer.rotary(self.config)
        self.frequencies = RotaryFrequencies(rotary) if rotary is not None else None

    def _oracle(self):
        case = self.case
        rope = {"rope_theta": case.theta, "rope_type": "default", **(case.yarn or {})}
        common = {"hidden_size": case.hidden, "num_attention_heads": case.heads, "num_key_value_heads": case.heads}
        common |= {**self.sizes, "max_position_embeddings": 512, "attn_implementation": "eager"}
        if not case.rope:
            config = KimiLinearConfig(**common, pad_token_id=0)
            return kimi.KimiLinearAttention(config, 0).eval(), None
        if case.index is None:
            config = DeepseekV3Config(**common, rope_parameters=rope)
            return v3.DeepseekV3Attention(config, 0).eval(), v3.DeepseekV3RotaryEmbedding(config)
        heads, dims, k = case.index
        indexer = {"index_n_heads": heads, "index_head_dim": dims, "index_topk": k}
        config = DeepseekV32Config(**common, **indexer, rope_parameters=rope)
        return v32.DeepseekV32Attention(config, 0).eval(), v32.DeepseekV32RotaryEmbedding(config)

    def _config(self) -> ModelConfig:
        case = self.case
        name = "mla" if case.index is None else "dsa"
        options, fields = dict(self.sizes), {}
        if not case.rope:
            options["rope"] = False
        if case.yarn is not None:
            options |= {key: case.yarn.get(key, 0.0) for key in ("mscale", "mscale_all_dim")}
            fields = {
                "yarn_factor": case.yarn["factor"],
                "yarn_original_positions": case.yarn["original_max_position_embeddings"],
                "yarn_beta_fast": float(case.yarn["beta_fast"]),
                "yarn_beta_slow": float(case.yarn["beta_slow"]),
            }
        if case.index is not None:
            fields |= dict(zip(("index_heads", "index_head_dim", "index_topk"), case.index))
        return ModelConfig(
            layers=(name,),
            mixer_options={name: options},
            hidden_size=case.hidden,
            num_heads=case.heads,
            rope_theta=case.theta,
            max_positions=512,
            **{**EXACT, **fields},
        )

    def expected(self, x: Tensor) -> Tensor:
        """Return transformers' output for x [B, S, hidden]."""
        tokens = x.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(x.dtype).min).triu(1).expand(len(x), 1, -1, -1)
        if self.rotary is None:
            return self.oracle(x, attention_mask=mask)[0]
        angles = self.rotary(x, torch.arange(tokens)[None])
        return self.oracle(x, position_embeddings=angles, attention_mask=mask)[0]

    def context(self, positions: Tensor, **more: Any) -> Context:
        rotation = {} if self.frequencies is None else {self.mixer.name: self.frequencies.at(positions)}
        return Context(positions, rotation, **more)

    def whole(self, x: Tensor, aux: AuxOutputs | None = None, **more: Any) -> Tensor:
        """Return our output for whole sequences x [B, S, hidden]."""
        return self.mixer(x, self.context(torch.arange(x.shape[1])[None], aux=aux, **more))

    def cached(self, pieces: list[Tensor]) -> Tensor:
        """Return our output for sequences read in pieces [B, s, hidden] from the cache."""
        cache = Cache(self.config, len(pieces[0]), sum(piece.shape[1] for piece in pieces))
        outputs = []
        for piece in pieces:
            cache.begin(*piece.shape[:2])
            positions = cache.starts.unsqueeze(-1) + torch.arange(piece.shape[1])
            outputs.append(self.mixer(piece, self.context(positions), cache.layers[0]))
            cache.advance()
        return torch.cat(outputs, dim=1)


def ours(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{NAMES[module]}.{rest}"
