"""Which runs a campaign is of, and their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpool.errors import ConfigurationError
from qpool.training.campaign import grid

_VALUES = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.text(max_size=12), st.booleans(), st.none()
)


def test_all_combinations_over_the_base() -> None:
    found = grid.cells({"steps": 5, "seed": 9}, {"data": ["iris", "wine"], "seed": [1, 2]})
    assert [cell.name for cell in found] == [
        "data=iris,seed=1",
        "data=iris,seed=2",
        "data=wine,seed=1",
        "data=wine,seed=2",
    ]
    assert found[3].settings == {"steps": 5, "seed": 2, "data": "wine"}
    assert [cell.group for cell in found] == ["data=iris"] * 2 + ["data=wine"] * 2


def test_listed_cells_are_each_run_over_the_grid() -> None:
    listed = [{"layers": 1, "cutoff": 4}, {"layers": 2, "cutoff": 6}]
    found = grid.cells({}, {"seed": [1, 2]}, listed)
    assert [cell.own for cell in found] == [{**one, "seed": s} for one in listed for s in (1, 2)]
    assert len(grid.cells({"steps": 1}, {})) == 1


def test_drawn_cells_are_each_run_over_the_grid_for_each_listed_one() -> None:
    listed, drawn = [{"layers": 1}, {"layers": 2}], [{"cutoff": 4}, {"cutoff": 6}]
    found = grid.cells({"steps": 5}, {"seed": [1, 2]}, listed, drawn)
    assert [cell.own for cell in found] == [
        {**one, **trial, "seed": seed} for one in listed for trial in drawn for seed in (1, 2)
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, {"seed": []}), "grid.seed is empty"),
        (({}, {"seed": 3}), "must be a list"),
        (({}, {"data": "iris"}), "must be a list"),
        (({}, {"seed": [1, 1]}), "two cells have the same settings: seed=1 and seed=1"),
        (({}, {"seed": [1]}, [{"seed": 2}]), "in the grid and in a cell"),
        (({}, {"seed": [1]}, [], [{"seed": 2}]), "in the grid and in the search"),
        (({}, {}, [{"seed": 1}], [{"seed": 2}]), "in a cell and in the search"),
        (({"seed": 1}, {}, [{}, {"seed": 1}]), "two cells have the same settings: run and seed=1"),
    ],
)
def test_what_is_no_grid_is_refused(arguments, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        grid.cells(*arguments)


@given(st.dictionaries(st.sampled_from("abc"), _VALUES), st.dictionaries(st.sampled_from("abc"),
       _VALUES))  # fmt: skip
def test_names_tell_settings_apart_and_are_names_of_directories(one, other) -> None:
    names = grid.name_of(one), grid.name_of(other)
    if repr(one) != repr(other) and one != other:
        assert names[0] != names[1]
    for name in names:
        assert name == Path(name).name
        assert 0 < len(name) < 130
        assert not set(name) & set('/\\:*?"<>| \n')


def test_files_of_one_name_in_two_folders_are_told_apart() -> None:
    a, b = (grid.name_of({"data": f"{folder}/rows.csv"}) for folder in ("x", "y"))
    assert a != b
    assert a.startswith("data=rows-")


def test_a_file_is_read(tmp_path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'steps = 3\n[grid]\nseed = [1, 2]\n[[cells]]\ndata = "iris"\n[campaign]\ncores = 2\n'
    )
    found = grid.read(path)
    assert found == grid.Asked({"steps": 3}, {"seed": [1, 2]}, [{"data": "iris"}], {}, {"cores": 2})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gird]\nseed = [1]", r"unknown table \[gird\].*grid"),
        ("steps = ", "cannot be read"),
        ("grid = 3", r"one table \[grid\]"),
    ],
)
def test_what_is_no_campaign_is_refused(tmp_path, text, words) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        grid.read(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        grid.read(tmp_path / "none.toml")
