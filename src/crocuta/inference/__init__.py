"""From a model to what people want of it: generated text, log-likelihoods, embeddings."""
