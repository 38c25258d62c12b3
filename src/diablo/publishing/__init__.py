"""What others get of a run: model cards, uploads to the hub, GGUF files, and folders for Ollama."""
