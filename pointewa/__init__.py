"""Point-cloud transformers, and Experts Weights Averaging (EWA) for any ViT."""
