"""What goes out of the house: model cards, uploads to the hub, GGUF files and what Ollama takes."""
