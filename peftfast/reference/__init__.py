"""The definitions: plain PyTorch, any floating dtype up to float64, imported by tests, benchmarks and the last fallback."""
