"""The section ``push_to_hub`` of a recipe: where the result of a run is uploaded to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from diablo.errors import UserError
from diablo.models.builtin import PREFIX
from diablo.models.names import check_repository
from diablo.recipes.section import Section
from diablo.records.card import hub_id


class PushToHub(Section):
    """A repository on the hub, to which the adapter, or the model that was trained in full, is uploaded at the end."""

    repo: str = Field(description="OWNER/NAME: a repository on the hub; it is made if there is none")
    private: bool = Field(False, description="true or false: whether the repository must be private")
    base: str | None = Field(
        None, min_length=1, description="the id of the base model on the hub, if model is a folder on this machine"
    )

    def check(self, model: str, *, is_adapter: bool) -> None:
        """Check the names, without asking the hub.

        Args:
            model: the recipe's model.
            is_adapter: whether an adapter is trained, which names its base model.

        Raises:
            ValueError: with the message for the user.
        """
        try:
            check_repository(self.repo, "push_to_hub")
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.base is not None and hub_id(self.base) is None:
            raise ValueError(f"push_to_hub.base: found {self.base!r}; give the id of a model on the hub.")
        if is_adapter and self.base is None and not model.startswith(PREFIX) and hub_id(model) is None:
            raise ValueError(
                f"push_to_hub.base: missing; model is the folder {model!r}, which others do not have: give the id "
                "of that model on the hub."
            )


def _as_section(value: Any) -> Any:
    return {"repo": value} if isinstance(value, str) else value


OptionalPush = Annotated[PushToHub | None, BeforeValidator(_as_section, json_schema_input_type=str | PushToHub | None)]
