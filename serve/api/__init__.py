"""HTTP interface: OpenAI's completions, models, health, and tokenization."""
