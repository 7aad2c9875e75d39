"""Configurations: every file in configs/ is read, every mistake is one line with file, key, value and nearest name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_essl import evaluate_run
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import build_settings, config_to_table, config_to_toml, find_config, load_config
from fast_essl.photonics.config import PhotonicsConfig, load_preset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = """
[data]
train = "a.beton"
test = "b.beton"
[views]
view1 = { size = 32 }
view2 = { size = 32 }
transformed = { size = 16 }
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if not path.stem.startswith("study_"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(_write(tmp_path, config_to_toml(config))) == config
    is_essl = path.stem.startswith(("e_", "speedrun_"))
    assert (config.method.equivariance_weight > 0) == is_essl
    assert len(config.crop_recipes()) == (3 if is_essl else 2)


def test_e_simclr_cifar10_is_the_papers() -> None:
    config = load_config(CONFIGS / "e_simclr_cifar10.toml")
    baseline = load_config(CONFIGS / "simclr_cifar10.toml")
    assert [recipe.size for recipe in config.crop_recipes()] == [32, 32, 16]
    for recipe in config.crop_recipes():
        assert recipe.scale == (0.2, 1.0)
        assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.4, 0.1)
        assert (recipe.jitter_p, recipe.grey_p, recipe.blur_p, recipe.solarize_p) == (0.8, 0.2, 0.0, 0.0)
    assert (config.train.batch_size, config.train.epochs, config.optimizer.warmup_epochs) == (512, 800, 10)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
    assert (config.method.temperature, config.method.equivariance_weight) == (0.5, 0.4)
    assert config.optimizer.base_learning_rate == 0.06
    assert baseline.optimizer.base_learning_rate == 0.03
    assert baseline.views == config.views


def test_quotes_and_backslashes_survive_a_round_trip(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, MINIMAL), ["--data.train", 'C:\\a "b"\té.beton'])
    assert load_config(_write(tmp_path, config_to_toml(config))) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL + "[train]\nepochs = 20\nmax_steps = 5\n")
    words = "--train.max-steps 7 --method.equivariance-weight=0 --views.view1.scale 0.1 1"
    words += " --model.zero-init-residual true --data.train /x/y.beton --train.seed 3"
    config = load_config(path, words.split())
    assert (config.train.epochs, config.train.max_steps, config.train.seed) == (20, 7, 3)
    assert config.method.equivariance_weight == 0.0
    assert isinstance(config.method.equivariance_weight, float)
    assert config.views.view1.scale == (0.1, 1.0)
    assert config.model.zero_init_residual is True
    assert config.data.train == Path("/x/y.beton")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "[train]\nmax_stepps = 3",
            "unknown key train.max_stepps = 3; the nearest valid name is train.max_steps",
        ),
        ("[trian]\nepochs = 3", "unknown key [trian]; the nearest valid name is [train]"),
        ("epochs = 3", "unknown key epochs = 3; the nearest valid name is train.epochs"),
        ("[train]\nepochs = '3'", "train.epochs = '3': must be a whole number"),
        ("[train]\nepochs = 3.0", "train.epochs = 3.0: must be a whole number"),
        ("[train]\nepochs = true", "train.epochs = True: must be a whole number"),
        ("[train]\nepochs = 0", "train.epochs = 0: must be 1 or more"),
        ("[model]\nzero_init_residual = 1", "model.zero_init_residual = 1: must be true or false"),
        (
            "[model]\nstem = 'cifr'",
            "model.stem = 'cifr': must be one of 'cifar', 'imagenet'; the nearest is 'cifar'",
        ),
        ("[model]\nstem = ['cifar']", "model.stem = ['cifar']: must be one of"),
        ("[method]\ntemperature = nan", "method.temperature = nan: must be a number"),
        ("[method]\nequivariance_weight = -0.1", "method.equivariance_weight = -0.1: must be 0 or more"),
        ("[method]\nequivariance_weight = inf", "method.equivariance_weight = inf: must be 0 or more"),
        (
            "[optimizer]\nwarmup_epochs = 900",
            "optimizer.warmup_epochs = 900: must be at most train.epochs = 800",
        ),
        ("train = 3", "train = 3: must be a section, [train]"),
        ("[train\n", "not a TOML file"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = _write(tmp_path, (text + "\n" + MINIMAL) if not text.startswith("[") else MINIMAL + text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {wanted}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("size = 16", "size = 0", "views.transformed.size = 0: must be from 1 to 4096 pixels"),
        (
            "size = 16",
            "siez = 16",
            "unknown key views.transformed.siez = 16; the nearest valid name is views.transformed.size",
        ),
        ("size = 16", "scale = [0.1]", "views.transformed.scale = [0.1]: must be 2 numbers"),
        ("size = 16", "", "views.transformed.size is missing and has no default"),
        ('train = "a.beton"', "", "data.train is missing and has no default"),
        ('train = "a.beton"', "train = 3", "data.train = 3: must be a path in quotes"),
    ],
)
def test_a_mistake_below_a_section_is_one_line(tmp_path: Path, old: str, new: str, wanted: str) -> None:
    path = _write(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {wanted}"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "--train.max-stepps 3",
            "unknown option --train.max-stepps 3; the nearest valid name is --train.max-steps",
        ),
        ("--train.max-steps x", "train.max_steps = 'x': must be a whole number"),
        ("--train.max-steps -1", "train.max_steps = -1: must be 0 or more"),
        ("--train.max-steps", "--train.max-steps: takes one value, 0 given"),
        ("--train.max-steps 1 2", "--train.max-steps: takes one value, 2 given"),
        ("--views.view1.scale 0.1", "views.view1.scale = [0.1]: must be 2 numbers"),
        ("--views.view1.scale 0.1 1 2", "views.view1.scale = [0.1, 1.0, 2.0]: must be 2 numbers"),
        ("--views.view1.scale 0.1 2", "views.view1.scale = (0.1, 2.0): must be 0 < low <= high <= 1"),
        (
            "--views.view1.crop centre",
            "views.view1.crop = 'centre': must be one of 'random', 'center'; the nearest is 'center'",
        ),
        ("--model.zero-init-residual yes", "model.zero_init_residual = 'yes': must be true or false"),
        ("--train 3", "unknown option --train 3"),
        ("stray", "'stray' follows no option; write --section.field VALUE"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(tmp_path: Path, words: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(_write(tmp_path, MINIMAL), words.split())
    assert str(error.value).startswith(f"command line: {wanted}")
    assert "\n" not in str(error.value)


def test_the_baseline_cuts_no_third_crop(tmp_path: Path) -> None:
    config: Config = load_config(_write(tmp_path, MINIMAL), ["--method.equivariance-weight", "0"])
    assert config.crop_recipes() == (config.views.view1, config.views.view2)


def test_a_recipe_is_found_by_name_and_a_file_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("simclr_cifar10")).samefile(CONFIGS / "simclr_cifar10.toml")
    assert find_config(Path("my.toml")) == Path("my.toml")
    with pytest.raises(ConfigError, match="the nearest is e_simclr_cifar10"):
        find_config(Path("e_simclr_cifar"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--train.accumulate 2 --train.compile reduce-overhead", "CUDA graphs give the memory of gradients"),
        (
            "--views.sizes 16 32 --views.size-epochs 900",
            r"views.size_epochs = \[900\]: must be below train.epochs",
        ),
        ("--views.sizes 5000 32 --views.size-epochs 1", "from 1 to 4096 pixels"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(_write(tmp_path, MINIMAL), overrides.split())


def _with_numbers_replaced(
    table: dict[str, Any], value: float, prefix: str = ""
) -> Iterator[tuple[str, dict]]:
    """(key, table) for each field of a configuration that holds numbers, with `value` in their place."""
    for name, held in table.items():
        if isinstance(held, dict):
            for key, inner in _with_numbers_replaced(held, value, f"{prefix}{name}."):
                yield key, {**table, name: inner}
        elif isinstance(held, list):
            yield prefix + name, {**table, name: [value] * (len(held) or 2)}
        elif type(held) in (int, float):
            yield prefix + name, {**table, name: value}


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), 2**5_000, 2**63, 1e308, -1e308, math.inf, math.nan],
    ids=["1e400", "-1e400", "2**5000", "2**63", "1e308", "-1e308", "inf", "nan"],
)
@pytest.mark.parametrize("kind", [Config, PhotonicsConfig])
def test_no_field_takes_an_absurd_number(kind: type, value: float) -> None:
    config = load_preset(Path("cpu")) if kind is PhotonicsConfig else load_config(RECIPES[0])
    keys = []
    for key, table in _with_numbers_replaced(config_to_table(config), value):
        with pytest.raises(ConfigError) as error:
            build_settings(kind, table, source="my.toml")
        message = str(error.value)
        assert message.startswith(f"my.toml: {key} = "), message
        assert ": must be " in message and "\n" not in message and len(message) < 500, message
        keys.append(key)
    assert len(keys) > 30


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "--train.num-threads 1000000000",
            "train.num_threads = 1000000000: must be 0 or more, at most 1,024",
        ),
        ("--data.num-workers 1000000", "data.num_workers = 1000000: must be 0 or more, at most 1,024"),
        ("--views.view1.size 1000000", "views.view1.size = 1000000: must be from 1 to 4096 pixels"),
        ("--model.width 10000000", "model.width = 10000000: must be 1 or more, at most 1,024"),
        ("--train.batch-size 10000000", "train.batch_size = 10000000: must be 2 or more, at most 1,048,576"),
        (
            "--optimizer.weight-decay 1e308",
            "optimizer.weight_decay = 1e+308: must be 0 or more, at most 1,000",
        ),
        ("--train.epochs 1e400", "train.epochs = '1e400': must be a whole number"),
        ("--train.seed 1" + 5000 * "0", "train.seed = '1"),
    ],
)
def test_an_absurd_override_is_told_with_what_is_allowed(tmp_path: Path, words: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(_write(tmp_path, MINIMAL), words.split())
    assert str(error.value).startswith(f"command line: {wanted}")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "data is missing|data.train is missing"),
        (b"\xff\xfe", "not a TOML file"),
        (b"a = \0", "not a TOML file"),
        (b"[train]\nepochs = 1" + 5000 * b"0", "not a TOML file"),
        (b"[train]\nepochs = 0x" + 5000 * b"f", "epochs = a number of thousands of digits: must be below 2"),
        (b"a = " + 5000 * b"[", "nested too deeply"),
        (b"a = " + 50 * b"[" + 50 * b"]", "nested more than 16 deep"),
        (b"a" + 5000 * b".a" + b" = 1", "nested more than 16 deep"),
        (b"#" * (2**20 + 1), "more than 1,048,576 bytes"),
        (b'data.train = "a\\u0000b"', "data.train = 'a.x00b': must be UTF-8 text without a NUL"),
        (b'data.train = ""', "data.train = '': must be the path of a file"),
        (b'extends = "a\\u0000b"', "extends = 'a.x00b': must be the name of a recipe"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, content: bytes, wanted: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=wanted) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).data.train == Path("a.beton")


def test_a_fifo_or_a_device_in_place_of_the_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "my.toml")
    for path in (tmp_path / "my.toml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: is not a regular file"):
            load_config(path)
    with pytest.raises(IsADirectoryError, match="configs"):
        load_config(CONFIGS)


def test_files_that_extend_one_another_end(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    # By another path each time: sub/../sub/../…
    (tmp_path / "a.toml").write_text('extends = "sub/b"')
    (tmp_path / "sub" / "b.toml").write_text('extends = "../a"')
    with pytest.raises(ConfigError, match=r"extends itself, by way of .*b\.toml"):
        load_config(tmp_path / "a.toml")
    (tmp_path / "link.toml").symlink_to("again.toml")
    (tmp_path / "again.toml").symlink_to("link.toml")
    (tmp_path / "looped.toml").write_text('extends = "link"')
    with pytest.raises((OSError, ConfigError), match="link"):
        load_config(tmp_path / "looped.toml")
    for number in range(30):
        (tmp_path / f"chain{number}.toml").write_text(f'extends = "chain{number + 1}"')
    with pytest.raises(ConfigError, match=r"chain0\.toml extends more than 16 files"):
        load_config(tmp_path / "chain0.toml")


def test_a_text_that_is_not_utf_8_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    # As the system hands over a word that is not UTF-8.
    word = b"caf\xe9.beton".decode("utf-8", "surrogateescape")
    with pytest.raises(ConfigError, match=r"command line: data\.train = .*must be UTF-8 text"):
        load_config(_write(tmp_path, MINIMAL), ["--data.train", word])


def test_more_threads_than_a_core_can_serve_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_run, "num_cores", lambda: 2)
    config = load_config(_write(tmp_path, MINIMAL), ["--train.num-threads", "1000"])
    with pytest.raises(
        ConfigError, match=r"train.num_threads = 1000: must be at most 128 on the 2 cores here"
    ):
        evaluate_run.use_threads(config)
