"""Fields of other completion servers that this one does not have, and their values that change nothing.

Clients of OpenAI, vLLM, llama.cpp and Text Generation Inference often send every option at its neutral value. Such
fields are dropped. Other values would change the completion on those servers, so they are refused by name. Null means
that a field is omitted, whatever its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.api.schemas.validation import field_error, quote_value, wrong_item

_NUMBER = (int, float)

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": ("",),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    # vLLM
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "logprob_token_ids": (),
    "watermarking": (False,),
    "request_id": (),
    "stream_interval": (1,),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,),
    "detokenize": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "priority": (0,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    # llama.cpp
    "n_predict": (),
    "n_cmpl": (1,),
    "n_keep": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_probs": (0,),
    "id_slot": (-1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "adaptive_target": (-1,),
    "dynatemp_range": (0,),
    "repeat_penalty": (1,),
    "penalize_nl": (False,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "grammar": ("",),
    "json_schema": (),
    "lora": ([],),
    "image_data": ([],),
    "samplers": (),
    "response_fields": ([],),
    "return_tokens": (False,),
    "return_progress": (False,),
    "post_sampling_probs": (False,),
    "timings_per_token": (False,),
    "sse_ping_interval": (),
    "t_max_predict_ms": (0,),
    "t_max_prompt_ms": (0,),
    # Text Generation Inference and transformers
    "return_full_text": (False,),
    "details": (False,),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "watermark": (False,),
    "truncate": (),
    "max_new_tokens": (),
    "adapter_id": (),
    "typical": (1,),
    "top_a": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
}
"""Values that change nothing. The first is named in the error for any other value."""

NEUTRAL_TYPES: dict[str, tuple[type, ...]] = {
    # Tags and hints for a provider, which do not enter the completion
    "user": (str,),
    "safety_identifier": (str,),
    "prompt_cache_key": (str,),
    "prompt_cache_retention": (str,),
    "cache_prompt": (bool,),
    "cache_salt": (str,),
    "session_id": (str,),
    "n_cache_reuse": _NUMBER,
    # Settings of samplers, searches and truncation that cannot be switched on
    "truncation_side": (str,),
    "length_penalty": _NUMBER,
    "early_stopping": (bool,),
    "repeat_last_n": _NUMBER,
    "dynatemp_exponent": _NUMBER,
    "dry_base": _NUMBER,
    "dry_allowed_length": _NUMBER,
    "dry_penalty_last_n": _NUMBER,
    "dry_sequence_breakers": (list,),
    "xtc_threshold": _NUMBER,
    "mirostat_tau": _NUMBER,
    "mirostat_eta": _NUMBER,
    "min_keep": _NUMBER,
    "adaptive_decay": _NUMBER,
    "guided_decoding_backend": (str,),
    "guided_whitespace_pattern": (str,),
    # The text of a completion contains no special tokens
    "spaces_between_special_tokens": (bool,),
}
"""Types of fields without effect on a completion, whatever their value."""

_COMPLETIONS_ONLY = {"suffix", "add_special_tokens"}
CHAT_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    **{name: values for name, values in NEUTRAL_VALUES.items() if name not in _COMPLETIONS_ONLY},
    # OpenAI
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    # vLLM. A template may write BOS itself, so none is put in front.
    "add_special_tokens": (False,),
    "echo": (False,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    # llama.cpp
    "reasoning_format": ("none", "auto"),
    "parse_tool_calls": (False,),
}
CHAT_NEUTRAL_TYPES: dict[str, tuple[type, ...]] = {
    **NEUTRAL_TYPES,
    # The server does not parse tool calls
    "parallel_tool_calls": (bool,),
    "tool_prompt": (str,),
}

_TYPE_NAMES = {str: "a string", bool: "true or false", list: "a list", int: "a number"}


def drop_neutral(
    fields: Mapping[str, Any],
    neutral_values: Mapping[str, tuple[Any, ...]],
    neutral_types: Mapping[str, tuple[type, ...]],
) -> dict[str, Any]:
    """Return ``fields`` without nulls, and without the fields of the two tables.

    Raises a :func:`~serve.api.schemas.validation.field_error` for a value that is not neutral.
    """
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in neutral_values:
            values = neutral_values[name]
            if not any(_equal(value, neutral) for neutral in values):
                exception = f" except as {json.dumps(values[0])}" if values else ""
                problem = f"not supported by this server{exception}, found {quote_value(value)}; omit the field"
                raise field_error(name, problem)
        elif name in neutral_types:
            types = neutral_types[name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise wrong_item(name, f"{_TYPE_NAMES[types[0]]} (the field has no effect)", value)
        else:
            kept[name] = value
    return kept


def _equal(value: Any, neutral: Any) -> bool:
    """Compare JSON values. In Python, False equals 0 and True equals 1; in JSON they do not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
