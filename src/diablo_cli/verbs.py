"""The application with all its verbs."""

# isort: off
# Verbs are listed in the order in which their modules are imported.
from diablo_cli import recipes, training, scoring, models, classifying, embedding, publishing, serving
from diablo_cli.shell import app

# isort: on

__all__ = ["app", "classifying", "embedding", "models", "publishing", "recipes", "scoring", "serving", "training"]
