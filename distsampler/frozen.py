"""Frozen values with checked fields; those that a user makes say in sentences what is wrong."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)
from pydantic_core import ErrorDetails

from distsampler.errors import ConfigError, unknown_name
from distsampler.redaction import redacted
from distsampler.references import Named

NUMBER = "number"  # tags what is not "auto"; errors leave it out

Count = Annotated[int, Field(ge=1)]
NamedField = Annotated[Named, PlainValidator(Named.of), PlainSerializer(str)]


class Frozen(BaseModel):
    """A value that cannot be changed and knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replaced(self, **changes: Any) -> Self:  # noqa: ANN401 (its fields)
        """Return a copy with other values, validated; fields not set so far remain not set."""
        return type(self)(**self.explicit | changes)

    @property
    def explicit(self) -> dict[str, Any]:
        """The fields that were set, and not left at their defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class Config(Frozen):
    """A frozen value whose errors are sentences: what must hold, what was got."""

    model_config = ConfigDict(allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __init__(self, **data: object) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                lines = [_sentence(type(self), detail) for detail in error.errors()]
                raise ConfigError("\n".join(lines)) from None

        def __setattr__(self, name: str, value: object) -> None:
            raise ConfigError(
                f"a config is frozen: replaced({name}={value!r}) returns a copy with another value"
            )

        def model_copy(
            self, *, update: Mapping[str, object] | None = None, deep: bool = False
        ) -> Self:
            """Return a copy; pydantic's own would not validate what is changed."""
            return self.replaced(**update) if update else super().model_copy(deep=deep)

    def merged(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values, validated; a part keeps what is not changed in it.

        Args:
            changes: fields; those of a part nested (``{"sampler": {"lr": 1e-4}}``) or by path
                (``{"sampler.lr": 1e-4}``).

        Raises:
            ConfigError: if there is no such field, or a value cannot be.
        """
        values: dict[str, Any] = {}
        for path, value in changes.items():
            home, _, option = path.partition(".")
            if home not in type(self).model_fields:
                raise ConfigError(self.unknown(home))
            before = values.get(home, getattr(self, home))
            if isinstance(before, Config) and (option or isinstance(value, Mapping)):
                values[home] = before.replaced(**({option: value} if option else value))
            elif option:
                raise ConfigError(f"{path}: {home} holds no options")
            else:
                values[home] = value
        return self.replaced(**values)

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return a sentence for an option that the config does not have."""
        return unknown_name("option", name, cls.model_fields)


def _sentence(model: type[Config], detail: ErrorDetails) -> str:
    """Return a pydantic error as a sentence: where, what must hold, what was got."""
    where = ".".join(str(part) for part in detail["loc"] if part != NUMBER)
    if detail["type"] == "extra_forbidden":
        return model.unknown(where)
    if detail["type"] == "model_type":
        kind = detail.get("ctx", {}).get("class_name")
        return f"{where}: must be a {kind}, or a dict of its fields, got {detail['input']!r}"
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # of a config inside this one
        return f"{where}: {cause}"
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return message
    got = redacted(detail["input"], named=True)
    return f"{where}: {message[0].lower()}{message[1:]}, got {got!r}"
