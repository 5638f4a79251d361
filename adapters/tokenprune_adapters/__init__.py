"""Model adapters: one module per model family, and the bundled models."""
