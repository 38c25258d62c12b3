"""Speed, memory and quality beside PEFT's methods."""
