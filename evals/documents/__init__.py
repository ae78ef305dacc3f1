"""Generated evaluation and training documents, and the filler text they are made of."""
