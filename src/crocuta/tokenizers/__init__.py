"""Text to token ids and back: ``bytes`` (Evo), ``dna`` (HyenaDNA), ``pieces`` (tokenizer.json)."""
