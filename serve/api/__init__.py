"""HTTP interface: OpenAI's completions and chat completions, models, health, tokenizer, caches, metrics, and a page."""
