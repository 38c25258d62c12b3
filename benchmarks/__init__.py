"""Speed and memory against PEFT's methods: one script a question, all methods interleaved in one run."""
