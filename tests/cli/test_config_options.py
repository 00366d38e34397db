"""Options made from the fields of config dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from helpers.options import parameters_of
from phatgoose import config as settings
from phatgoose.cli.config_options import Fields, config_options, described
from phatgoose.errors import ConfigError

CONFIGS = [value for name, value in vars(settings).items() if name.endswith("Config")]


@dataclass(frozen=True, kw_only=True)
class Animal:
    """An animal.

    Attributes:
        legs: Legs that it stands on. Wings do not
            count.
        sound: What it says.
    """

    legs: int = 4
    sound: Literal["moo", "honk"] = "moo"

    def __post_init__(self) -> None:
        if self.legs < 0:
            raise ConfigError("legs must not be negative", found=str(self.legs))


@dataclass(frozen=True, kw_only=True)
class Goose(Animal):
    """A goose.

    Attributes:
        wild: Lives
            in the wild.
        altitude: Height in metres; None on the ground.
    """

    legs: int = 2
    wild: bool = False
    altitude: float | None = None


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def app(calls: list[dict[str, Any]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @config_options
    def fly(
        *,
        place: Annotated[str, typer.Argument(help="Where to.")],
        goose: Goose,
        speed: Annotated[int, typer.Option(help="Speed.")] = 3,
        cow: Annotated[Animal, Fields(sound="cow_sound")],
    ) -> None:
        """Fly somewhere."""
        calls.append({"place": place, "goose": goose, "speed": speed, "cow": cow})

    @app.command()
    def land() -> None:
        """Land."""

    return app


def test_one_option_per_field(app: typer.Typer) -> None:
    made = parameters_of(app)["fly"]
    assert list(made) == ["PLACE", "--wild", "--altitude", "--legs", "--sound", "--speed", "--cow-sound"]
    assert {name: (option["type"], option["default"]) for name, option in made.items()} == {
        "PLACE": ("str", None),
        "--wild": ("bool", False),
        "--altitude": ("float", None),
        "--legs": ("int", 2),
        "--sound": (["moo", "honk"], "moo"),
        "--speed": ("int", 3),
        "--cow-sound": (["moo", "honk"], "moo"),
    }


def test_the_command_gets_the_dataclasses(app: typer.Typer, calls: list[dict[str, Any]]) -> None:
    options = ["--wild", "--altitude", "1.5", "--speed", "5", "--cow-sound", "honk"]
    assert CliRunner().invoke(app, ["fly", "south", *options]).exit_code == 0
    assert CliRunner().invoke(app, ["fly", "north", "--legs", "1"]).exit_code == 0
    assert calls == [
        {"place": "south", "goose": Goose(wild=True, altitude=1.5), "speed": 5, "cow": Animal(sound="honk")},
        {"place": "north", "goose": Goose(legs=1), "speed": 3, "cow": Animal()},
    ]


def test_invalid_values_never_reach_the_command(app: typer.Typer, calls: list[dict[str, Any]]) -> None:
    invalid = CliRunner().invoke(app, ["fly", "south", "--legs", "-1"])
    assert isinstance(invalid.exception, ConfigError)
    assert CliRunner().invoke(app, ["fly", "south", "--sound", "meow"]).exit_code == 2
    assert calls == []


def test_help_is_the_first_sentence() -> None:
    assert described(Goose, "wild").help == "Lives in the wild."
    assert described(Goose, "legs").help == "Legs that it stands on."  # inherited
    assert described(Goose, "altitude").help == "Height in metres; None on the ground."


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_described(config: type[Any]) -> None:
    assert len(CONFIGS) >= 10
    for field in fields(config):
        text = described(config, field.name).help
        assert text, f"{config.__name__}.{field.name}"
        assert text.endswith(".")
        assert text[0].isupper()


def test_two_options_of_one_name_are_refused() -> None:
    def herd(*, one: Animal, other: Animal) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        config_options(herd)
