"""Models and adapters on disk: loading, saving, checking and inspecting them."""
