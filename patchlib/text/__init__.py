"""Text for language models: tokenisers, files of tokens, and the n-gram models to beat."""
