"""The learning table: what it runs, what it reads, what it makes of it."""

from __future__ import annotations

import json

from click.testing import CliRunner

from qpool import cli
from qpool.studies import learning
from qpool.training.config import Config


def test_each_cell_is_a_command_that_train_takes(tmp_path) -> None:
    for data in learning.DATA:
        verb, *options = learning.command(data, 2, None, tmp_path)
        made = cli.cli.commands[verb].make_context(verb, options)
        assert made.params["data"] == data
        assert made.params["encoding"] in ("coherent_state", "classical_neural")
        known = {n: v for n, v in made.params.items() if n in Config.__dataclass_fields__}
        Config.of(known).check()


def test_finished_runs_are_read_and_summed_up(tmp_path, monkeypatch) -> None:
    ran = []

    def run(arguments):
        ran.append(arguments)
        seed = next(int(a.split("=")[1]) for a in arguments if a.startswith("--seed"))
        out = tmp_path / f"ring-default-{seed}"
        out.mkdir()
        distances = {"before": 0.4, "after": 0.1 * seed, "floor": 0.08}
        summary = {"coverage": 0.7, "ket_norm": 0.99, "training_seconds": 30.0}
        (out / "summary.json").write_text(json.dumps({"energy_distance": distances, **summary}))

    monkeypatch.setattr(learning, "_run", run)
    done = CliRunner().invoke(
        learning.main, ["--data", "ring", "--out", str(tmp_path), "--json"], catch_exceptions=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["seed"], round(row["after"], 3)) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert len(ran) == 3
    said: list[str] = []
    again = learning.learn(("ring",), 3, None, tmp_path, said.append)
    assert again == rows
    assert len(ran) == 3  # none was run again
    (summed,) = learning.by_data(rows)
    assert (summed["seeds"], round(summed["after"], 3), round(summed["worst_after"], 3)) == (
        3,
        0.2,
        0.3,
    )
